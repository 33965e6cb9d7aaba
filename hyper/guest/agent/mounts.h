/* The OCI mounts: values of config.json turned into mounts of the new API. */
#ifndef AGENT_MOUNTS_H
#define AGENT_MOUNTS_H

#include "setup.h"

/* Mount `m` below `root`; sources of binds are below `binds`. original: of the directory that fills an empty volume, or -1. */
int mounts_apply(int root, int binds, const struct mount *m, int original, struct error *e);
/* The same in two steps, for two mount namespaces: a detached mount; its place. */
int mounts_make(int binds, const struct mount *m, int original, struct error *e);
int mounts_place(int root, int mounted, const struct mount *m, struct error *e);
/* Attach the tree of `source` (an O_PATH descriptor) to `target`; attributes are MOUNT_ATTR_*, for the whole tree. */
int mounts_bind(int source, int target, uint64_t attributes);

#endif
