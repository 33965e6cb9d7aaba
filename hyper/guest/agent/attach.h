/* Mounts that come and go while the workload runs. */
#ifndef AGENT_ATTACH_H
#define AGENT_ATTACH_H

#include "workload.h"

/* ATTACH: a MOUNT, made here, where the share of binds and the disks are, and placed in the workload's root. */
int attach_mount(const struct workload *w, uint8_t *body, size_t length, struct error *e);
/* DETACH: `1 destination`, `2 force`: also while it is in use, for whom it then stays until he lets go. */
int attach_unmount(const struct workload *w, struct fields *fields, struct error *e);

#endif
