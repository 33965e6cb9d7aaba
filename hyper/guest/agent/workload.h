/* The workload: its namespaces with a process that waits in them, and the programs started there. */
#ifndef AGENT_WORKLOAD_H
#define AGENT_WORKLOAD_H

#include "process.h"
#include "setup.h"

enum workload_state { WORKLOAD_NONE, WORKLOAD_READY, WORKLOAD_RUNNING, WORKLOAD_OVER };

struct workload {
    enum workload_state state;
    pid_t pid;   /* of init */
    int pidfd;
    int channel; /* to the waiting process */
    int cgroup;
    int own_pid_namespace;
    unsigned layers;
    bool foreign_root, read_only; /* of SETUP: the root is a directory of the host; it is to be read-only */
};

int workload_setup(struct workload *w, uint8_t *body, size_t length, struct error *e);
/* Start init, or one more program; the process is in the table and its pid known. */
struct process *workload_run(struct workload *w, struct processes *all, uint32_t id, uint8_t *body, size_t length, struct error *e);
struct process *workload_exec(struct workload *w, struct processes *all, uint32_t id, uint8_t *body, size_t length, struct error *e);
/* For another host than the one that started them: init goes on, everything else that it had started is killed. Returns init,
 * NULL when there is none. */
struct process *workload_resume(struct workload *w, struct processes *all, uint32_t id, uint8_t *body, size_t length, struct error *e);

#endif
