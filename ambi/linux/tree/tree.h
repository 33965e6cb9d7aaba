/* Looking into a root file system and changing it: tar streams out and in, differences. See ambi/shim/PROTOCOL.md, "Trees".
 *
 * One process does one request and ends. Whoever starts it has made it enter the root by chroot, without a right that the job
 * does not need, and with these descriptors: TREE_IN and TREE_OUT the stream, TREE_ANSWER where the answer goes as fields of
 * the guest protocol (1 size, 2 mode, 3 mtime ns, 4 link; or 16 kind, 17 message of an error), TREE_UPPER for `diff` and
 * `layer`: the upper directory, while the root is what lies below it. */
#ifndef TREE_TREE_H
#define TREE_TREE_H

#include <stddef.h>
#include <stdint.h>

enum { TREE_IN = 0, TREE_OUT = 1, TREE_ANSWER = 3, TREE_UPPER = 4 };
enum { TREE_FOLLOW = 1, TREE_NO_OVERWRITE_DIR_NON_DIR = 2, TREE_COPY_IDS = 4 };
enum { TREE_SIZE = 1, TREE_MODE, TREE_MTIME, TREE_LINK, TREE_ERROR_KIND = 16, TREE_ERROR_MESSAGE };

struct tree_request {
    const char *verb, *path;
    unsigned flags;
    uint32_t uid, gid;           /* with TREE_COPY_IDS: who owns what `put` makes */
    const char *const *excluded; /* mount points, which are no part of `diff` and `layer`; NULL at the end */
};

/* Does not return. */
void tree_main(const struct tree_request *request) __attribute__((noreturn));

#endif
