/* Pseudo-terminals of the workload's own devpts. */
#ifndef AGENT_TERMINAL_H
#define AGENT_TERMINAL_H

#include "spec.h"

/* In the workload's root: a new pair, sized and owned as the spec says; the first process's becomes /dev/console too. */
int terminal_make(const struct spec *spec, bool console, int *master, int *slave, struct error *e);
/* Write to a file of procfs, and to nothing that an image put in its place (CVE-2025-52881). */
int terminal_write_proc(const char *path, const char *text);

#endif
