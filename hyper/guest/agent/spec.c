#include "spec.h"

#include <string.h>

static bool parse_rlimit(struct spec *spec, const struct field *outer) {
    struct fields fields;
    struct field f;
    if (spec->rlimit_count == MAX_RLIMITS || !fields_open(&fields, outer->data, outer->length))
        return false;
    struct rlimit_entry *entry = &spec->rlimits[spec->rlimit_count++];
    while (fields_next(&fields, &f)) {
        uint64_t value;
        if (!field_number(&f, &value))
            return false;
        if (f.tag == 1)
            entry->resource = value;
        else if (f.tag == 2)
            entry->soft = value;
        else if (f.tag == 3)
            entry->hard = value;
    }
    return true;
}

static bool parse_group(struct spec *spec, const struct field *f) {
    uint64_t value;
    if (spec->group_count == MAX_GROUPS || !field_number(f, &value) || value > UINT32_MAX - 1)
        return false;
    spec->groups[spec->group_count++] = (uint32_t)value;
    return true;
}

static bool parse_oom_score_adj(struct spec *spec, const struct field *f) {
    uint64_t value;
    if (!field_number(f, &value))
        return false;
    spec->has_oom_score_adj = true;
    spec->oom_score_adj = (int64_t)value;
    return true;
}

static bool parse_seccomp(struct spec *spec, const struct field *f) {
    spec->seccomp = f->data;
    spec->seccomp_length = f->length;
    return f->length % 8 == 0 && f->length / 8 <= UINT16_MAX;
}

static bool parse_field(struct spec *spec, const struct field *f) {
    switch (f->tag) {
    case 1:
        return strings_add(&spec->args, field_string(f));
    case 2:
        return strings_add(&spec->env, field_string(f));
    case 3:
        return (spec->cwd = field_string(f));
    case 4:
        return (spec->user = field_string(f));
    case 5:
        return field_number(f, &spec->uid) && spec->uid < UINT32_MAX;
    case 6:
        return field_number(f, &spec->gid) && spec->gid < UINT32_MAX;
    case 7:
        return parse_group(spec, f);
    case 8:
        return field_number(f, &spec->umask);
    case 9:
        return field_number(f, &spec->terminal);
    case 10:
        return field_number(f, &spec->rows);
    case 11:
        return field_number(f, &spec->columns);
    case 12:
        return field_number(f, &spec->stdin_open);
    case 13 ... 17:
        return field_number(f, &spec->capabilities[f->tag - 13]);
    case 18:
        return field_number(f, &spec->no_new_privs);
    case 19:
        return parse_seccomp(spec, f);
    case 20:
        return parse_rlimit(spec, f);
    case 21:
        return parse_oom_score_adj(spec, f);
    case 22:
        return strings_add(&spec->group_names, field_string(f));
    default:
        return false;
    }
}

int spec_parse(struct spec *spec, uint8_t *body, size_t length, struct error *e) {
    struct fields fields;
    struct field f;
    memset(spec, 0, sizeof(*spec));
    spec->umask = 022;
    if (!fields_open(&fields, body, length))
        return fail(e, "InvalidRequest", "PROCESS is not a sequence of fields");
    while (fields_next(&fields, &f))
        if (!parse_field(spec, &f))
            return fail(e, "InvalidRequest", "PROCESS: field %u is damaged, or not of this version", f.tag);
    if (spec->args.count == 0)
        return fail(e, "InvalidRequest", "PROCESS: no program to run");
    return 0;
}

const char *spec_getenv(const struct spec *spec, const char *name) {
    size_t length = strlen(name);
    for (size_t i = spec->env.count; i-- > 0;)
        if (strncmp(spec->env.at[i], name, length) == 0 && spec->env.at[i][length] == '=')
            return spec->env.at[i] + length + 1;
    return NULL;
}
