#include "parts.h"

static size_t digits_of(size_t number) {
    size_t count = 1;
    while (number /= 10)
        count++;
    return count;
}

static void put_decimal(struct records *r, size_t number) {
    size_t count = digits_of(number);
    for (size_t i = count; i--; number /= 10)
        r->at[r->length + i] = (char)('0' + number % 10);
    r->length += count;
}

static void put(struct records *r, const void *data, size_t length) {
    memcpy(r->at + r->length, data, length);
    r->length += length;
}

/* `LENGTH KEY=VALUE\n`, where LENGTH counts itself. The key is `key` and `name`. */
void record_add(struct records *r, const char *key, const char *name, const void *value, size_t length) {
    size_t rest = strlen(key) + strlen(name) + length + 3, total = rest + digits_of(rest);
    total = rest + digits_of(total);
    if (r->length + total > sizeof(r->at))
        give_up("Unsupported", "its extended attributes are more than an archive can have:", path_text, 0);
    put_decimal(r, total);
    put(r, " ", 1);
    put(r, key, strlen(key));
    put(r, name, strlen(name));
    put(r, "=", 1);
    put(r, value, length);
    put(r, "\n", 1);
}

/* Those of overlayfs are about where a file lies, those of security modules about the host. */
bool xattr_may_be_set(const char *name) {
    if (starts_with(name, "user."))
        return !starts_with(name, "user.overlay.");
    return strcmp(name, "security.capability") == 0 || starts_with(name, "system.posix_acl_");
}

void xattrs_collect(struct records *r, const char *name) {
    static char list[65536], value[65536];
    long length = SYS3(llistxattr, name, list, sizeof(list));
    if (length == -EOPNOTSUPP || length == -ENOENT || length == -EACCES)
        return;
    if (length < 0)
        give_up_on("cannot list the extended attributes of", path_text, length);
    for (char *at = list; at < list + length; at += strlen(at) + 1) {
        if (!xattr_may_be_set(at))
            continue;
        long size = SYS4(lgetxattr, name, at, value, sizeof(value));
        if (size >= 0)
            record_add(r, "SCHILY.xattr.", at, value, (size_t)size);
        else if (size != -ENODATA && size != -ENOENT && size != -EOPNOTSUPP)
            give_up_on("cannot read an extended attribute of", path_text, size);
    }
}
