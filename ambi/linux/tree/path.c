#include "parts.h"

enum { MAX_LINKS = 40 };

char path_text[PATH_LIMIT];
size_t path_length;

size_t path_push(const char *name) {
    size_t before = path_length, length = strlen(name);
    bool slash = path_length && path_text[path_length - 1] != '/';
    if (path_length + length + 2 > PATH_LIMIT)
        give_up("InvalidRequest", "a path is longer than can be archived:", path_text, 0);
    if (slash)
        path_text[path_length++] = '/';
    memcpy(path_text + path_length, name, length + 1);
    path_length += length;
    return before;
}

void path_pop(size_t length) {
    path_length = length;
    path_text[length] = 0;
}

bool path_clean(const char *path, char *into) {
    size_t length = 0;
    bool inside = true;
    while (*path) {
        const char *end = path;
        while (*end && *end != '/')
            end++;
        size_t part = (size_t)(end - path);
        if (part == 2 && path[0] == '.' && path[1] == '.') {
            inside = inside && length;
            while (length && into[--length] != '/')
                ;
        } else if (part && !(part == 1 && *path == '.')) {
            if (length + part + 2 > PATH_LIMIT)
                give_up("InvalidRequest", "a path is longer than can be used:", path, 0);
            into[length++] = '/';
            memcpy(into + length, path, part);
            length += part;
        }
        path = *end ? end + 1 : end;
    }
    if (!length)
        into[length++] = '/';
    into[length] = 0;
    return inside;
}

/* One link of `done` + "/" + `part` replaced: what is left to follow becomes its target and `rest`. */
static bool replace_link(char *done, size_t *length, const char *part, const char *rest, char *left) {
    static char target[PATH_LIMIT], joined[PATH_LIMIT];
    size_t before = *length;
    done[before] = '/';
    memcpy(done + before + 1, part, strlen(part) + 1);
    long n = SYS4(readlinkat, HERE, done, target, sizeof(target) - 1);
    if (n <= 0 || (size_t)n + strlen(rest) + before + 3 > PATH_LIMIT) {
        *length = before + 1 + strlen(part);
        return false;
    }
    target[n] = 0;
    size_t at = 0;
    if (target[0] != '/') {
        memcpy(joined, done, before);
        at = before;
        joined[at++] = '/';
    }
    memcpy(joined + at, target, (size_t)n);
    at += (size_t)n;
    joined[at++] = '/';
    memcpy(joined + at, rest, strlen(rest) + 1);
    path_clean(joined, left);
    *length = 0;
    return true;
}

void path_follow(const char *path, char *into) {
    static char left[PATH_LIMIT], next[PATH_LIMIT], part[PATH_LIMIT];
    size_t length = 0;
    path_clean(path, left);
    for (int links = 0; left[0] == '/' && left[1] && links < MAX_LINKS;) {
        size_t end = 1;
        while (left[end] && left[end] != '/')
            end++;
        memcpy(part, left + 1, end - 1);
        part[end - 1] = 0;
        size_t rest = strlen(left + end);
        memcpy(next, left + end, rest + 1);
        if (replace_link(into, &length, part, next, left))
            links++;
        else
            memcpy(left, next, rest + 1);
    }
    if (!length)
        into[length++] = '/';
    into[length] = 0;
}
