/* From a process in the workload's namespaces to the workload's program. */
#ifndef AGENT_BECOME_H
#define AGENT_BECOME_H

#include "spec.h"

/* What comes back to the agent over a SOCK_SEQPACKET pair. */
enum report_kind { REPORT_READY = 'R', REPORT_TERMINAL = 'T', REPORT_ERROR = 'E' };

struct report {
    uint8_t kind;
    struct error error;
};

void report_send(int channel, enum report_kind kind, const struct error *error, int fd);

/* The last steps and execve(2). `stdio` are the three descriptors to be used, ignored with a terminal, which is made here and
 * sent over `channel`. `init`: this process stays as the reaping pid 1 and the program is its child. `first`: it is the
 * workload's first process, for which the directory cwd is made and the root becomes read-only if it is to be.
 * Returns only on failure, with the error reported. */
void become(struct spec *spec, const int stdio[3], int channel, bool first, bool init, bool read_only);

#endif
