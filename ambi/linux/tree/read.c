/* An archive that somebody sent: v7, ustar, GNU and PAX, with sparse files in every form. Whatever breaks the format ends the
 * work. The same rules as images/layers/tar.py: PAX over GNU's long names over the header. */
#include "parts.h"

enum { IN_BYTES = 128 << 10, EXTENSION_LIMIT = 1 << 20, MAX_EXTENTS = 65536 };

static char in[IN_BYTES];
static size_t in_at, in_have;
static uint64_t data_left, padding_left;
static char pax[EXTENSION_LIMIT + 1], long_name[PATH_LIMIT], long_link[PATH_LIMIT], path[PATH_LIMIT], target[PATH_LIMIT];
static size_t pax_length;
static uint64_t extents[MAX_EXTENTS * 2];
static size_t extent_numbers;

static void broken(const char *what) __attribute__((noreturn));
static void broken(const char *what) {
    give_up("InvalidRequest", "the archive is damaged:", what, 0);
}

static bool fill(void) {
    while (in_at == in_have) {
        long n = SYS3(read, TREE_IN, in, sizeof(in));
        if (n == -EINTR)
            continue;
        if (n < 0)
            give_up_on("cannot read the archive", NULL, n);
        if (n == 0)
            return false;
        in_at = 0;
        in_have = (size_t)n;
    }
    return true;
}

/* False at the end of the stream, if that is before the first byte. */
static bool take(void *into, size_t length) {
    char *to = into;
    bool first = true;
    while (length) {
        if (!fill()) {
            if (first)
                return false;
            broken("it is cut short");
        }
        first = false;
        size_t some = in_have - in_at < length ? in_have - in_at : length;
        memcpy(to, in + in_at, some);
        in_at += some;
        to += some;
        length -= some;
    }
    return true;
}

static void skip(uint64_t length) {
    while (length) {
        if (!fill())
            broken("it is cut short");
        size_t some = in_have - in_at < length ? in_have - in_at : (size_t)length;
        in_at += some;
        length -= some;
    }
}

size_t read_data(const char **data, size_t length) {
    if (!data_left)
        return 0;
    if (!fill())
        broken("it is cut short");
    size_t some = in_have - in_at < length ? in_have - in_at : length;
    if (some > data_left)
        some = (size_t)data_left;
    *data = in + in_at;
    in_at += some;
    data_left -= some;
    return some;
}

/* Octal with blanks and NULs around, or base 256 with the top bit set. */
static int64_t number(const unsigned char *field, size_t size) {
    int64_t value = 0;
    if (field[0] & 0x80) {
        value = field[0] & 0x40 ? -1 : 0;
        for (size_t i = 0; i < size; i++)
            value = (int64_t)((uint64_t)value << 8) | (i ? field[i] : (field[0] & 0x40 ? field[0] : field[0] & 0x3f));
        return value;
    }
    size_t i = 0;
    while (i < size && (field[i] == ' ' || (!field[i] && !i)))
        i++;
    for (; i < size && field[i] && field[i] != ' '; i++) {
        if (field[i] < '0' || field[i] > '7')
            broken("a header has something else where a number belongs");
        value = value << 3 | (field[i] - '0');
    }
    return value;
}

static uint64_t decimal(const char *at, size_t length) {
    uint64_t value = 0;
    if (!length || length > 19)
        broken("a number is none");
    for (size_t i = 0; i < length; i++) {
        if (at[i] < '0' || at[i] > '9')
            broken("a number is none");
        value = value * 10 + (uint64_t)(at[i] - '0');
    }
    return value;
}

/* `-1.5` is a second and a half before 1970. */
static void time_of(struct member *m, const char *at, size_t length) {
    bool negative = length && *at == '-';
    size_t whole = negative, digits = 0;
    int64_t ns = 0;
    while (whole < length && at[whole] != '.')
        whole++;
    m->mtime = whole == (size_t)negative ? 0 : (int64_t)decimal(at + negative, whole - negative);
    for (size_t i = whole + 1; digits < 9; i++, digits++) {
        char digit = i < length ? at[i] : '0';
        if (digit < '0' || digit > '9')
            broken("a time is none");
        ns = ns * 10 + (digit - '0');
    }
    if (negative) {
        m->mtime = -m->mtime - (ns ? 1 : 0);
        ns = ns ? 1000000000 - ns : 0;
    }
    m->mtime_ns = ns;
}

bool pax_next(const char **at, const char *end, const char **key, size_t *key_length, const char **value, size_t *value_length) {
    if (*at >= end)
        return false;
    const char *blank = *at;
    while (blank < end && *blank != ' ')
        blank++;
    uint64_t length = blank < end ? decimal(*at, (size_t)(blank - *at)) : 0;
    if (length > (uint64_t)(end - *at) || *at + length <= blank + 1 || (*at)[length - 1] != '\n')
        broken("a PAX record has another length than it says");
    const char *last = *at + length - 1, *equals = blank + 1;
    while (equals < last && *equals != '=')
        equals++;
    if (equals == last || equals == blank + 1)
        broken("a PAX record has no key");
    *key = blank + 1;
    *key_length = (size_t)(equals - *key);
    *value = equals + 1;
    *value_length = (size_t)(last - *value);
    *at += length;
    return true;
}

static bool is_key(const char *key, size_t length, const char *wanted) {
    return strlen(wanted) == length && memcmp(key, wanted, length) == 0;
}

static void copy_path(char *into, const char *text, size_t length) {
    if (length >= PATH_LIMIT)
        broken("a path is too long");
    for (size_t i = 0; i < length; i++)
        if (!text[i])
            broken("a path has a NUL in it");
    memcpy(into, text, length);
    into[length] = 0;
}

static void add_extent_number(uint64_t value) {
    if (extent_numbers == MAX_EXTENTS * 2)
        give_up("Unsupported", "a sparse file has too many pieces:", path, 0);
    extents[extent_numbers++] = value;
}

struct sparse {
    bool is, in_data;
    int64_t size;
};

static void apply_sparse(struct sparse *s, const char *key, size_t key_length, const char *value, size_t length) {
    s->is = true;
    if (is_key(key, key_length, "GNU.sparse.name")) {
        copy_path(path, value, length);
    } else if (is_key(key, key_length, "GNU.sparse.realsize") || is_key(key, key_length, "GNU.sparse.size")) {
        s->size = (int64_t)decimal(value, length);
    } else if (is_key(key, key_length, "GNU.sparse.major")) {
        s->in_data = is_key(value, length, "1");
    } else if (is_key(key, key_length, "GNU.sparse.offset") || is_key(key, key_length, "GNU.sparse.numbytes")) {
        add_extent_number(decimal(value, length));
    } else if (is_key(key, key_length, "GNU.sparse.map")) {
        for (const char *end = value + length; value < end; value++) {
            const char *from = value;
            while (value < end && *value != ',')
                value++;
            add_extent_number(decimal(from, (size_t)(value - from)));
        }
    }
}

static void apply_pax(struct member *m, struct sparse *s) {
    const char *at = pax, *end = pax + pax_length, *key, *value;
    size_t key_length, length;
    while (pax_next(&at, end, &key, &key_length, &value, &length)) {
        if (key_length > 11 && memcmp(key, "GNU.sparse.", 11) == 0)
            apply_sparse(s, key, key_length, value, length);
        else if (!length)
            continue;
        else if (is_key(key, key_length, "path") && !s->is)
            copy_path(path, value, length);
        else if (is_key(key, key_length, "linkpath"))
            copy_path(target, value, length);
        else if (is_key(key, key_length, "size"))
            m->stored = decimal(value, length);
        else if (is_key(key, key_length, "uid"))
            m->uid = (unsigned)decimal(value, length);
        else if (is_key(key, key_length, "gid"))
            m->gid = (unsigned)decimal(value, length);
        else if (is_key(key, key_length, "mtime"))
            time_of(m, value, length);
    }
    m->xattrs = pax;
    m->xattrs_length = pax_length;
}

static size_t field_length(const char *field, size_t size) {
    size_t length = 0;
    while (length < size && field[length])
        length++;
    return length;
}

static bool verify(const unsigned char *h) {
    unsigned sum = 8 * ' ';
    bool zero = true;
    for (size_t i = 0; i < BLOCK; i++) {
        zero = zero && !h[i];
        if (i < 148 || i >= 156)
            sum += h[i];
    }
    if (zero)
        return false;
    if ((int64_t)sum != number(h + 148, 8))
        broken("a header has a wrong check sum");
    return true;
}

static void read_name(char *into, uint64_t size) {
    if (size >= PATH_LIMIT)
        broken("a path is too long");
    if (!take(into, (size_t)size) && size)
        broken("it is cut short");
    into[size] = 0;
    skip(-size % BLOCK);
}

static void old_map(const unsigned char *h) {
    unsigned char more[BLOCK];
    for (size_t at = 386; at + 24 <= 482; at += 24)
        if (h[at + 12]) {
            add_extent_number((uint64_t)number(h + at, 12));
            add_extent_number((uint64_t)number(h + at + 12, 12));
        }
    bool goes_on = h[482];
    while (goes_on) {
        if (!take(more, BLOCK))
            broken("it is cut short");
        for (size_t at = 0; at + 24 <= 504; at += 24)
            if (more[at + 12]) {
                add_extent_number((uint64_t)number(more + at, 12));
                add_extent_number((uint64_t)number(more + at + 12, 12));
            }
        goes_on = more[504];
    }
}

/* The map of format 1.0: lines at the start of the data, padded to a block. */
static void map_in_data(struct member *m) {
    char line[24];
    size_t length = 0;
    uint64_t used = 0, wanted = 0;
    bool counted = false;
    while (!counted || extent_numbers < 2 * wanted) {
        char c;
        if (used++ >= m->stored || !take(&c, 1))
            broken("the map of a sparse file does not end");
        if (c != '\n') {
            if (length == sizeof(line))
                broken("the map of a sparse file is none");
            line[length++] = c;
            continue;
        }
        uint64_t value = decimal(line, length);
        length = 0;
        if (counted)
            add_extent_number(value);
        else
            wanted = value;
        counted = true;
        if (wanted > MAX_EXTENTS)
            give_up("Unsupported", "a sparse file has too many pieces:", path, 0);
    }
    skip(-used % BLOCK);
    used += -used % BLOCK;
    if (used > m->stored)
        broken("the map of a sparse file does not end");
    data_left = m->stored - used;
}

static void check_map(struct member *m) {
    uint64_t end = 0, sum = 0;
    if (extent_numbers % 2)
        broken("the map of a sparse file is none");
    for (size_t i = 0; i < extent_numbers; i += 2) {
        if (extents[i] < end || extents[i] > m->size || extents[i + 1] > m->size - extents[i])
            broken("a sparse file has pieces that overlap, or are beyond its end");
        end = extents[i] + extents[i + 1];
        sum += extents[i + 1];
    }
    if (sum != data_left)
        broken("a sparse file stores another number of bytes than its map says");
    m->extents = extents;
    m->extent_count = extent_numbers / 2;
}

static char plain_type(char flag) {
    switch (flag) {
    case 0:
    case '0':
    case '7':
    case 'S':
        return '0';
    case 'D':
        return '5';
    case '1':
    case '2':
    case '3':
    case '4':
    case '5':
    case '6':
        return flag;
    default:
        broken("it has an entry of an unknown kind");
    }
}

static void read_header(struct member *m, const unsigned char *h) {
    const char *text = (const char *)h;
    size_t length = field_length(text, 100), prefix = 0;
    memset(m, 0, sizeof(*m));
    if (memcmp(text + 257, "ustar", 6) == 0)
        prefix = field_length(text + 345, 155);
    memcpy(path, text + 345, prefix);
    if (prefix)
        path[prefix++] = '/';
    copy_path(path + prefix, text, length);
    copy_path(target, text + 157, field_length(text + 157, 100));
    m->mode = (unsigned)number(h + 100, 8) & 07777;
    m->uid = (unsigned)number(h + 108, 8);
    m->gid = (unsigned)number(h + 116, 8);
    m->stored = (uint64_t)number(h + 124, 12);
    m->mtime = number(h + 136, 12);
    m->type = plain_type(text[156]);
    if (m->type == '3' || m->type == '4') {
        m->major = (unsigned)number(h + 329, 8);
        m->minor = (unsigned)number(h + 337, 8);
    }
}

/* The bytes of the entry, of which only files have any whatever the header says, as Go's archive/tar has it. */
static void find_data(struct member *m, const unsigned char *h, struct sparse *s) {
    bool old = h[156] == 'S', has_data = m->type == '0' || h[156] == 'D';
    if (m->stored > INT64_MAX || s->size > INT64_MAX / 2)
        broken("an entry has an impossible size");
    data_left = has_data ? m->stored : 0;
    padding_left = -data_left % BLOCK;
    m->size = m->type == '0' ? m->stored : 0;
    if (old) {
        m->size = (uint64_t)number(h + 483, 12);
        old_map(h);
    } else if (s->is && m->type == '0') {
        m->size = (uint64_t)s->size;
        if (s->in_data)
            map_in_data(m);
    } else {
        return;
    }
    if (m->size > INT64_MAX)
        broken("an entry has an impossible size");
    check_map(m);
}

static void read_extension(const unsigned char *h, uint64_t size) {
    switch (h[156]) {
    case 'L':
        read_name(long_name, size);
        break;
    case 'K':
        read_name(long_link, size);
        break;
    case 'x':
    case 'X':
        if (size > EXTENSION_LIMIT)
            broken("an extension header is too large");
        if (!take(pax, (size_t)size) && size)
            broken("it is cut short");
        pax_length = (size_t)size;
        skip(-size % BLOCK);
        break;
    default: /* of the whole archive, or its label: nothing of it is about where and how files are made */
        skip(size);
        skip(-size % BLOCK);
    }
}

bool read_member(struct member *m) {
    unsigned char h[BLOCK];
    skip(data_left);
    skip(padding_left);
    data_left = padding_left = 0;
    pax_length = extent_numbers = 0;
    long_name[0] = long_link[0] = 0;
    for (;;) {
        struct sparse s = {0};
        if (!take(h, BLOCK) || !verify(h)) {
            while (fill()) /* what follows the end belongs to the sender, who may be writing it */
                in_at = in_have;
            return false;
        }
        int64_t size = number(h + 124, 12);
        if (size < 0)
            broken("an entry has an impossible size");
        if (h[156] == 'L' || h[156] == 'K' || h[156] == 'x' || h[156] == 'X' || h[156] == 'g' || h[156] == 'V') {
            read_extension(h, (uint64_t)size);
            continue;
        }
        read_header(m, h);
        if (long_name[0])
            copy_path(path, long_name, strlen(long_name));
        if (long_link[0])
            copy_path(target, long_link, strlen(long_link));
        apply_pax(m, &s);
        find_data(m, h, &s);
        m->path = path;
        m->link = target;
        return true;
    }
}
