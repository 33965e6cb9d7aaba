/* The rules are those of github.com/moby/sys/user, GetExecUser: a number is looked up as a number first, the first matching
 * line wins, and the supplementary groups of a user with an entry are added unless a group was given. */
#include "users.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DATABASE_LIMIT = 4 << 20, MAX_FIELDS = 7 };
static const unsigned long MAX_ID = 0x7fffffff;

struct wanted {
    const char *text;
    bool is_number;
    unsigned long number;
};

static bool parse_id(const char *text, unsigned long *value) {
    char *end;
    if (!*text || !strchr("0123456789", *text))
        return false;
    errno = 0;
    *value = strtoul(text, &end, 10);
    return !*end && errno == 0;
}

static struct wanted want(const char *text) {
    struct wanted wanted = {.text = text};
    wanted.is_number = parse_id(text, &wanted.number);
    return wanted;
}

static bool matches(const struct wanted *wanted, const char *name, unsigned long id) {
    return wanted->is_number ? wanted->number == id : strcmp(wanted->text, name) == 0;
}

/* The next line of `cursor`, cut in place at its colons; false at the end. */
static bool next_entry(char **cursor, char *fields[MAX_FIELDS]) {
    static char empty[] = "";
    for (;;) {
        char *line = strsep(cursor, "\n");
        if (!line)
            return false;
        if (!*line || *line == '#')
            continue;
        for (int i = 0; i < MAX_FIELDS; i++) {
            char *field = line ? strsep(&line, ":") : empty;
            fields[i] = field ? field : empty;
        }
        return true;
    }
}

struct account {
    bool found;
    char name[256];
    char home[256];
    unsigned long uid, gid;
};

/* name:password:uid:gid:gecos:home:shell */
static void find_account(const struct wanted *wanted, struct account *account) {
    char *text = read_whole("/etc/passwd", DATABASE_LIMIT), *cursor = text, *fields[MAX_FIELDS];
    while (!account->found && text && next_entry(&cursor, fields)) {
        unsigned long uid, gid;
        if (!parse_id(fields[2], &uid) || !parse_id(fields[3], &gid) || !matches(wanted, fields[0], uid))
            continue;
        account->found = true;
        account->uid = uid;
        account->gid = gid;
        snprintf(account->name, sizeof(account->name), "%s", fields[0]);
        snprintf(account->home, sizeof(account->home), "%s", fields[5]);
    }
    free(text);
}

static bool is_member(char *members, const char *name) {
    for (char *member; (member = strsep(&members, ","));)
        if (strcmp(member, name) == 0)
            return true;
    return false;
}

static void add_group(struct spec *spec, uint32_t gid) {
    for (size_t i = 0; i < spec->group_count; i++)
        if (spec->groups[i] == gid)
            return;
    if (spec->group_count < MAX_GROUPS)
        spec->groups[spec->group_count++] = gid;
}

/* name:password:gid:members */
static void add_memberships(struct spec *spec, const char *name) {
    char *text = read_whole("/etc/group", DATABASE_LIMIT), *cursor = text, *fields[MAX_FIELDS];
    while (text && next_entry(&cursor, fields)) {
        unsigned long gid;
        if (parse_id(fields[2], &gid) && gid <= MAX_ID && is_member(fields[3], name))
            add_group(spec, (uint32_t)gid);
    }
    free(text);
}

static bool find_group(const struct wanted *wanted, unsigned long *found_gid) {
    char *text = read_whole("/etc/group", DATABASE_LIMIT), *cursor = text, *fields[MAX_FIELDS];
    bool found = false;
    while (!found && text && next_entry(&cursor, fields)) {
        unsigned long gid;
        if (parse_id(fields[2], &gid) && matches(wanted, fields[0], gid)) {
            found = true;
            *found_gid = gid;
        }
    }
    free(text);
    return found;
}

/* `what` as docker's daemon says it; `file` below /etc has no such name. */
static int unknown(struct error *e, const char *what, const char *name, const char *file) {
    fail(e, "InvalidRequest", "%s %s: no matching entries in %s file", what, name, file);
    snprintf(e->hint, sizeof e->hint, "give a number, or a name in the image's /etc/%s", file);
    return -1;
}

static int resolve_group(struct spec *spec, const char *text, struct error *e) {
    struct wanted wanted = want(text);
    unsigned long gid = wanted.number;
    if (!find_group(&wanted, &gid) && !wanted.is_number)
        return unknown(e, "unable to find group", text, "group");
    spec->gid = gid;
    return 0;
}

/* The error has the words of docker's --group-add. */
static int resolve_group_names(struct spec *spec, struct error *e) {
    for (size_t i = 0; i < spec->group_names.count; i++) {
        struct wanted wanted = {.text = spec->group_names.at[i]};
        unsigned long gid;
        if (!find_group(&wanted, &gid))
            return unknown(e, "Unable to find group", wanted.text, "group");
        if (gid > MAX_ID)
            return fail(e, "InvalidRequest", "uids and gids must be in range 0-%lu", MAX_ID);
        add_group(spec, (uint32_t)gid);
    }
    return 0;
}

static int resolve_names(struct spec *spec, struct account *account, struct error *e) {
    char *group = strchr(spec->user, ':');
    if (group)
        *group++ = 0;
    struct wanted wanted = want(*spec->user ? spec->user : "0");
    find_account(&wanted, account);
    if (!account->found && !wanted.is_number)
        return unknown(e, "unable to find user", spec->user, "passwd");
    spec->uid = account->found ? account->uid : wanted.number;
    spec->gid = account->found ? account->gid : 0;
    if (group && *group) {
        if (resolve_group(spec, group, e) < 0)
            return -1;
    } else if (account->found) {
        add_memberships(spec, account->name);
    }
    if (spec->uid > MAX_ID || spec->gid > MAX_ID)
        return fail(e, "InvalidRequest", "uids and gids must be in range 0-%lu", MAX_ID);
    return 0;
}

int user_resolve(struct spec *spec, char home[256], struct error *e) {
    struct account account = {0};
    if (spec->user && *spec->user) {
        if (resolve_names(spec, &account, e) < 0)
            return -1;
    } else {
        struct wanted wanted = {.is_number = true, .number = spec->uid};
        find_account(&wanted, &account);
    }
    if (resolve_group_names(spec, e) < 0)
        return -1;
    add_group(spec, (uint32_t)spec->gid);
    snprintf(home, 256, "%s", account.found && *account.home ? account.home : "/");
    return 0;
}
