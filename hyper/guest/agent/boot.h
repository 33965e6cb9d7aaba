/* From the kernel's first process to one that can talk to its host, and back to no machine at all. */
#ifndef AGENT_BOOT_H
#define AGENT_BOOT_H

#include "util.h"

/* Kernel file systems, standard streams, a root that pivot_root(2) works from, modules, `lo`. */
void boot(void);
/* Ends everything, writes all disks back and stops the machine. Does not return. */
void power_off(void) __attribute__((noreturn));

int clock_set(uint64_t wall_ns);
/* Credit `length` random bytes to the kernel's pool and have it reseed: a restored clone must not share its state. */
int entropy_add(const uint8_t *bytes, size_t length);

#endif
