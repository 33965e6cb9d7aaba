/* Kernel modules of the initramfs, loaded by what they are for. */
#ifndef AGENT_MODULES_H
#define AGENT_MODULES_H

/* Load the modules of `group` (see initramfs.py), dependencies first, each once. Failures are left to who needs the module. */
void modules_load(const char *group);
/* Load the drivers of the virtio devices that are there, that of disks in the background. */
void modules_load_for_devices(void);
/* Wait until the disks are there. */
void modules_settle(void);

#endif
