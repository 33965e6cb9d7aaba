/* What the files of this directory offer each other. */
#ifndef TREE_PARTS_H
#define TREE_PARTS_H

#include "system.h"
#include "tree.h"

enum { BLOCK = 512, PATH_LIMIT = 65536, XATTR_LIMIT = 1 << 20, NAME_LIMIT = 256 };

/* answer.c: the end of this process. */
void answer_done(void) __attribute__((noreturn));
void answer_number(unsigned tag, uint64_t value);
void answer_text(unsigned tag, const char *text);
/* `what`, and `subject` when it is not NULL, with the text of -`result` when that is not 0. */
void give_up(const char *kind, const char *what, const char *subject, long result) __attribute__((noreturn));
void give_up_on(const char *what, const char *subject, long result) __attribute__((noreturn));

/* path.c: the path of the entry that is being looked at, a stack of names joined by `/`. */
extern char path_text[PATH_LIMIT];
extern size_t path_length;
size_t path_push(const char *name); /* the length before, for path_pop */
void path_pop(size_t length);
/* `path` without `.`, `..` (applied to the text) and double slashes, absolute; false when it begins above the root. */
bool path_clean(const char *path, char *into);
/* `path` with every symbolic link in it followed below the root; what does not exist stays as it is. */
void path_follow(const char *path, char *into);

/* xattr.c: PAX records of the extended attributes of an entry. */
struct records {
    char at[XATTR_LIMIT];
    size_t length;
};
void record_add(struct records *r, const char *key, const char *name, const void *value, size_t length);
/* Those of `name` in the current directory. Only what an image may carry. */
void xattrs_collect(struct records *r, const char *name);
bool xattr_may_be_set(const char *name);

/* write.c: an archive. */
void write_member(const char *path, const char *link, char type, const struct statx *st, const struct records *extra,
                  uint64_t size);
void write_regular(int fd, const char *path, const struct statx *st, const struct records *extra);
void write_end(void);
void write_bytes(const void *data, size_t length);
void write_flush(void);

/* links.c: the path of an entry already written that is the same file; NULL for the first. */
const char *links_seen(const struct statx *st);
void links_remember(const struct statx *st, const char *path);

/* walk.c */
struct names {
    char **at;
    size_t count;
};
/* The sorted names in the directory `fd`, in the arena. */
struct names names_of(int fd);
/* The entry `name` of the current directory, whose descriptor is `here`, under path_text; all below it, too. Returns false when
 * it is not there any more. */
bool archive_entry(int here, const char *name);
void archive_children(int fd);
/* One entry without what is below it; opened when it is a regular file. */
bool archive_one(const char *name, const struct statx *st);

/* change.c */
void change_diff(const struct tree_request *request);
void change_layer(const struct tree_request *request);

/* read.c and put.c */
struct member {
    char *path, *link;
    char type;
    unsigned mode, uid, gid, major, minor;
    int64_t mtime, mtime_ns;
    uint64_t size;         /* of the file, with its holes */
    uint64_t stored;       /* bytes in the archive */
    const char *xattrs;    /* records of `SCHILY.xattr.` */
    size_t xattrs_length;
    const uint64_t *extents; /* pairs of offset and length; NULL without holes */
    size_t extent_count;
};
bool read_member(struct member *m);
/* At most `length` of the bytes of the present member; 0 at their end. */
size_t read_data(const char **data, size_t length);
bool pax_next(const char **at, const char *end, const char **key, size_t *key_length, const char **value, size_t *value_length);
void put_archive(const struct tree_request *request);

#endif
