/* The tasks of the workload, for PROCESSES. */
#ifndef AGENT_TASKS_H
#define AGENT_TASKS_H

#include "util.h"

/* Fields of the answer: one line a process, see PROTOCOL.md. */
bool tasks_list(struct buffer *body);

#endif
