#include "parts.h"

static char directory_part[PATH_LIMIT], name_part[PATH_LIMIT];

/* The directory of `path`, links in it followed, and the name in it; a name of nothing, as behind a slash, is the directory. */
static int split(const char *path) {
    size_t length = strlen(path), slash = length;
    if (length >= PATH_LIMIT || path[0] != '/')
        give_up("InvalidRequest", "this is no absolute path:", path, 0);
    while (path[slash - 1] != '/')
        slash--;
    memcpy(directory_part, path, slash);
    directory_part[slash] = 0;
    if (slash == length)
        memcpy(name_part, ".", 2);
    else
        memcpy(name_part, path + slash, length - slash + 1);
    int fd = open_path(HERE, directory_part, O_PATH | O_DIRECTORY, 0);
    if (fd < 0)
        give_up_on("cannot find", path, fd);
    return fd;
}

static void answer_stat(const char *path, const struct statx *st) {
    static char target[PATH_LIMIT];
    target[0] = 0;
    if (is_kind(st, S_IFLNK))
        path_follow(path, target);
    answer_number(TREE_SIZE, st->stx_size);
    answer_number(TREE_MODE, st->stx_mode);
    answer_number(TREE_MTIME, (uint64_t)(st->stx_mtime.tv_sec * 1000000000 + st->stx_mtime.tv_nsec));
    answer_text(TREE_LINK, target);
}

/* The name of the topmost entry: the last part of the path; "/" for the root. */
static const char *shown_name(const char *path) {
    static char shown[PATH_LIMIT];
    size_t end = strlen(path);
    while (end > 1 && path[end - 1] == '/')
        end--;
    size_t start = end;
    while (start && path[start - 1] != '/')
        start--;
    if (start == end)
        return "/";
    memcpy(shown, path + start, end - start);
    shown[end - start] = 0;
    return shown;
}

static void look(const struct tree_request *request, bool archive) {
    static char followed[PATH_LIMIT];
    const char *path = request->path;
    struct statx st;
    if (request->flags & TREE_FOLLOW) {
        path_follow(path, followed);
        path = followed;
    }
    int fd = split(path);
    int result = stat_of(fd, name_part, &st);
    if (result < 0)
        give_up_on("cannot find", path, result);
    if (is_kernel_file_system(fd))
        give_up("InvalidRequest", "what the kernel shows there is no file:", request->path, 0);
    answer_stat(path, &st);
    if (!archive)
        return;
    SYS1(fchdir, fd);
    path_push(shown_name(request->path));
    if (!archive_entry(fd, name_part))
        give_up("NotFound", "cannot find", request->path, -ENOENT);
    write_end();
}

static void export(void) {
    int fd = open_path(HERE, "/", O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        give_up_on("cannot open the root", NULL, fd);
    SYS1(fchdir, fd);
    archive_children(fd);
    write_end();
}

void tree_main(const struct tree_request *request) {
    const char *verb = request->verb;
    if (strcmp(verb, "stat") == 0)
        look(request, false);
    else if (strcmp(verb, "get") == 0)
        look(request, true);
    else if (strcmp(verb, "put") == 0)
        put_archive(request);
    else if (strcmp(verb, "diff") == 0)
        change_diff(request);
    else if (strcmp(verb, "layer") == 0)
        change_layer(request);
    else if (strcmp(verb, "export") == 0)
        export();
    else
        give_up("InvalidRequest", "no such way to look into a root:", verb, 0);
    answer_done();
}
