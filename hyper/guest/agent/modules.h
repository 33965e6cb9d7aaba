/* Kernel modules of the initramfs, loaded by what they are for. */
#ifndef AGENT_MODULES_H
#define AGENT_MODULES_H

#include <stdbool.h>

/* Load the modules of `group` (see initramfs.py), dependencies first, each once. Failures are left to who needs the module. */
void modules_load(const char *group);
/* Load the drivers of the virtio devices that are there, that of disks in the background. */
void modules_load_for_devices(void);
/* In a guest that becomes a template: load all drivers, but bind NICs to none, so that nothing of those it was made with is
 * known to it; nor disks, unless the host tells their driver when they are no longer empty. */
void modules_load_for_template(bool bind_disks);
/* Wait until the disks are there; those of a template are bound, or looked at again. */
void modules_settle(void);
/* Have the driver of virtio-mmio look again at the slots that were empty. */
void modules_look_again(void);
/* Whether a driver that is loaded binds the devices that are there (1) or leaves them alone (0). */
void modules_probe(bool automatic);

#endif
