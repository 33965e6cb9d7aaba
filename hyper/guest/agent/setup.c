#include "setup.h"

#include <stdlib.h>
#include <string.h>

bool strings_add(struct strings *list, char *text) {
    char **grown = text ? realloc(list->at, (list->count + 1) * sizeof(*grown)) : NULL;
    if (!grown)
        return false;
    list->at = grown;
    list->at[list->count++] = text;
    return true;
}

/* One more zeroed element; NULL without memory. */
static void *add(void **array, size_t *count, size_t size) {
    char *grown = realloc(*array, (*count + 1) * size);
    if (!grown)
        return NULL;
    *array = grown;
    return memset(grown + (*count)++ * size, 0, size);
}

bool mount_parse(struct mount *mount, uint8_t *body, size_t length) {
    struct fields fields;
    struct field f;
    bool ok = fields_open(&fields, body, length);
    while (ok && fields_next(&fields, &f)) {
        char *text = field_string(&f);
        ok = text != NULL;
        if (f.tag == 1)
            mount->destination = text;
        else if (f.tag == 2)
            mount->type = text;
        else if (f.tag == 3)
            mount->source = text;
        else if (f.tag == 4)
            ok = strings_add(&mount->options, text);
    }
    return ok && mount->destination && mount->type;
}

bool mount_is_bind(const struct mount *mount) {
    for (size_t i = 0; i < mount->options.count; i++)
        if (strcmp(mount->options.at[i], "bind") == 0 || strcmp(mount->options.at[i], "rbind") == 0)
            return true;
    return strcmp(mount->type, "bind") == 0;
}

bool mount_is_disk(const struct mount *mount) {
    return strcmp(mount->type, "ambi.disk") == 0;
}

static bool parse_mount(struct setup *setup, const struct field *outer) {
    struct mount *mount = add((void **)&setup->mounts, &setup->mount_count, sizeof(*mount));
    return mount && mount_parse(mount, outer->data, outer->length);
}

static bool parse_file(struct setup *setup, const struct field *outer) {
    struct file *file = add((void **)&setup->files, &setup->file_count, sizeof(*file));
    struct fields fields;
    struct field f;
    uint64_t number = 0644;
    bool ok = file && fields_open(&fields, outer->data, outer->length);
    while (ok && fields_next(&fields, &f)) {
        if (f.tag == 1) {
            ok = (file->path = field_string(&f)) != NULL;
        } else if (f.tag == 2) {
            ok = field_number(&f, &number);
        } else if (f.tag == 3) {
            file->content = f.data;
            file->length = f.length;
        }
    }
    if (ok)
        file->mode = (mode_t)(number & 07777);
    return ok && file->path;
}

static bool parse_sysctl(struct setup *setup, const struct field *outer) {
    struct sysctl *sysctl = add((void **)&setup->sysctls, &setup->sysctl_count, sizeof(*sysctl));
    struct fields fields;
    struct field f;
    bool ok = sysctl && fields_open(&fields, outer->data, outer->length);
    while (ok && fields_next(&fields, &f)) {
        char *text = field_string(&f);
        ok = text != NULL;
        if (f.tag == 1)
            sysctl->key = text;
        else if (f.tag == 2)
            sysctl->value = text;
    }
    return ok && sysctl->key && sysctl->value;
}

static bool parse_field(struct setup *setup, const struct field *f) {
    switch (f->tag) {
    case 1:
        return (setup->hostname = field_string(f));
    case 2:
        return (setup->domainname = field_string(f));
    case 3:
        return field_number(f, &setup->layers);
    case 4:
        return field_number(f, &setup->disk);
    case 5:
        return (setup->root_tag = field_string(f));
    case 6:
        return field_number(f, &setup->read_only);
    case 7:
        return parse_mount(setup, f);
    case 8:
        return parse_file(setup, f);
    case 9:
        return strings_add(&setup->masked, field_string(f));
    case 10:
        return strings_add(&setup->read_only_paths, field_string(f));
    case 11:
        return parse_sysctl(setup, f);
    case 12:
        return field_number(f, &setup->limits.memory);
    case 13:
        return field_number(f, &setup->limits.cpu_quota);
    case 14:
        return field_number(f, &setup->limits.cpu_period);
    case 15:
        return field_number(f, &setup->limits.pids);
    case 16:
        return field_number(f, &setup->limits.cpu_shares);
    case 17:
        return field_number(f, &setup->init);
    case 18:
        return strings_add(&setup->copies, field_string(f));
    default:
        return false;
    }
}

int setup_parse(struct setup *setup, uint8_t *body, size_t length, struct error *e) {
    struct fields fields;
    struct field f;
    memset(setup, 0, sizeof(*setup));
    if (!fields_open(&fields, body, length))
        return fail(e, "InvalidRequest", "SETUP is not a sequence of fields");
    while (fields_next(&fields, &f))
        if (!parse_field(setup, &f))
            return fail(e, "InvalidRequest", "SETUP: field %u is damaged, or not of this version", f.tag);
    return 0;
}
