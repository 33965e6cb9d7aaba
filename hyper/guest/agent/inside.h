/* Paths below the workload's root, which an image made: nothing here follows a link out of it. */
#ifndef AGENT_INSIDE_H
#define AGENT_INSIDE_H

#include "util.h"

#include <sys/stat.h>

/* An O_PATH descriptor (or one with `flags`) of `path` below `root`, as openat2(2) with RESOLVE_IN_ROOT; -1 and errno. */
int inside_open(int root, const char *path, uint64_t flags, uint64_t resolve);
/* The same, made first where it is not there: missing parents with mode 755. */
int inside_make_directory(int root, const char *path, mode_t mode);
int inside_make_file(int root, const char *path, mode_t mode);
/* Splits off the last component of a path that need not exist: the parent, made if missing, and its name. */
int inside_parent(int root, const char *path, char name[256]);

#endif
