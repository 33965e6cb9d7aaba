/* TREE: a process of ours that looks into the root or changes it, with streams as the workload's have. What it does there is in
 * ambi/linux/tree, which containers use as well. */
#ifndef AGENT_LOOK_H
#define AGENT_LOOK_H

#include "workload.h"

/* The process is in the table; its answer comes when it and its streams have ended. */
struct process *look_start(struct workload *w, struct processes *all, uint32_t id, uint8_t *body, size_t length, struct error *e);
/* What it has left in the pipe `answer`, with which status: the type of the message, whose fields are appended to `body`. */
uint16_t look_answer(int answer, int code, struct buffer *body);

#endif
