/* What of the guest's size changes while it runs: CPUs on line, and file systems on disks that have grown. */
#ifndef AGENT_SIZES_H
#define AGENT_SIZES_H

#include "fields.h"

/* CPUS: the first `1 number` CPUs on line, the others off; those that there are not are an error, and nothing changes. */
int sizes_cpus(struct fields *fields, struct error *e);
/* GROW: wait until the writable disk, whose serial number is `1`, has `2` bytes, and make its file system fill it. */
int sizes_grow(struct fields *fields, struct error *e);

#endif
