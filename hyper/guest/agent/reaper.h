/* docker's --init: a pid 1 that forwards signals to the program and reaps what is left to it. */
#ifndef AGENT_REAPER_H
#define AGENT_REAPER_H

#include <sys/types.h>

/* Returns 0 in the child, which is to execute the program. The caller stays as pid 1 and ends as the program did; it returns,
 * with -1, only when there could be no child. */
pid_t reaper_fork(int channel);

#endif
