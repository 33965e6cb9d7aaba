/* What an image has at the place of a volume, copied into the volume the first time. */
#ifndef AGENT_COPY_H
#define AGENT_COPY_H

#include "util.h"

/* If the directory `target` is empty: what the directory `source` has in it, with owners, modes, times, extended attributes,
 * links and devices, and `source`'s own owner and mode. All of it, or nothing: a copy that did not end is made again. */
int copy_into_empty(int source, int target, struct error *e);

#endif
