#include "lookup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* 0, or the errno that says why `path` is no program. */
static int check(const char *path) {
    struct stat st;
    if (stat(path, &st) < 0)
        return errno;
    if (S_ISDIR(st.st_mode))
        return EISDIR;
    if (!S_ISREG(st.st_mode) || !(st.st_mode & 0111))
        return EACCES;
    return faccessat(AT_FDCWD, path, X_OK, AT_EACCESS) < 0 ? errno : 0;
}

static int say(const char *name, int number, struct error *e) {
    if (number == EISDIR || number == EACCES || number == EPERM)
        return fail(e, "CommandNotExecutable", "exec: \"%s\": %s", name, errno_text(number));
    return fail(e, "CommandNotFound", "exec: \"%s\": stat %s: %s", name, name, errno_text(number));
}

int program_find(const struct spec *spec, char path[4096], struct error *e) {
    const char *name = spec->args.at[0];
    if (strchr(name, '/')) {
        int number = check(name);
        if (number)
            return say(name, number, e);
        if (snprintf(path, 4096, "%s", name) >= 4096)
            return say(name, ENAMETOOLONG, e);
        return 0;
    }
    const char *search = spec_getenv(spec, "PATH");
    while (search && *name) {
        size_t length = strcspn(search, ":");
        int used = snprintf(path, 4096, "%.*s/%s", length ? (int)length : 1, length ? search : ".", name);
        if (used < 4096 && check(path) == 0)
            return 0;
        search = search[length] ? search + length + 1 : NULL;
    }
    return fail(e, "CommandNotFound", "exec: \"%s\": executable file not found in $PATH", name);
}

int program_failed(const char *path, int number, struct error *e) {
    const char *kind = number == ENOENT || number == ENOTDIR ? "CommandNotFound" : "CommandNotExecutable";
    return fail(e, kind, "exec %s: %s", path, errno_text(number));
}
