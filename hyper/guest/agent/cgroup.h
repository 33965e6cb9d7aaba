/* The workload's cgroup v2 in the guest, and what it says. */
#ifndef AGENT_CGROUP_H
#define AGENT_CGROUP_H

#include "setup.h"

/* Makes the group; its directory's descriptor, for clone3, or -1. */
int cgroup_make(struct error *e);
int cgroup_limit(const struct limits *limits, struct error *e);
/* Returns when every process stands still, which is waited for for a second. */
int cgroup_freeze(struct error *e);
int cgroup_thaw(struct error *e);
void cgroup_kill(void);
uint64_t cgroup_oom_kills(void);
/* The fields of the answer to STATS. */
bool cgroup_stats(struct buffer *body);

#endif
