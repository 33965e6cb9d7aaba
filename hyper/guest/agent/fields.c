#include "fields.h"
#include "frame.h"

#include <stdlib.h>
#include <string.h>

static bool read_header(const uint8_t *at, size_t left, uint16_t *tag, size_t *length) {
    if (left < FIELD_HEADER || get_u16(at + 2) != 0)
        return false;
    *tag = get_u16(at);
    *length = get_u32(at + 4);
    return *length <= left - FIELD_HEADER;
}

bool fields_open(struct fields *f, uint8_t *body, size_t length) {
    uint8_t *from = body, *end = body + length, *to = body, *open = NULL;
    while (from < end) {
        uint16_t tag;
        size_t size;
        if (!read_header(from, (size_t)(end - from), &tag, &size))
            return false;
        bool part = tag != FIELD_MORE && (tag & FIELD_PART);
        uint16_t whole = part ? (uint16_t)(tag & ~FIELD_PART) : tag;
        if (open && get_u16(open) != whole)
            return false;
        if (!open) {
            open = to;
            put_u16(open, whole);
            put_u16(open + 2, 0);
            put_u32(open + 4, 0);
            to += FIELD_HEADER;
        }
        memmove(to, from + FIELD_HEADER, size);
        put_u32(open + 4, get_u32(open + 4) + (uint32_t)size);
        to += size;
        from += FIELD_HEADER + size;
        if (!part)
            open = NULL;
    }
    f->at = body;
    f->left = (size_t)(to - body);
    return !open;
}

bool fields_next(struct fields *f, struct field *field) {
    if (!read_header(f->at, f->left, &field->tag, &field->length))
        return false;
    field->data = f->at + FIELD_HEADER;
    f->at += FIELD_HEADER + field->length;
    f->left -= FIELD_HEADER + field->length;
    return true;
}

bool fields_end_with_more(const uint8_t *body, size_t length) {
    uint16_t tag;
    size_t size;
    while (read_header(body, length, &tag, &size)) {
        if (tag == FIELD_MORE && length == FIELD_HEADER)
            return true;
        body += FIELD_HEADER + size;
        length -= FIELD_HEADER + size;
    }
    return false;
}

bool field_number(const struct field *field, uint64_t *value) {
    if (field->length != 8)
        return false;
    *value = get_u64(field->data);
    return true;
}

char *field_string(const struct field *field) {
    if (memchr(field->data, 0, field->length))
        return NULL;
    char *text = malloc(field->length + 1);
    if (!text)
        return NULL;
    memcpy(text, field->data, field->length);
    text[field->length] = 0;
    return text;
}

static bool put_field(struct buffer *body, uint16_t tag, const uint8_t *data, size_t length) {
    uint8_t header[FIELD_HEADER];
    put_u16(header, tag);
    put_u16(header + 2, 0);
    put_u32(header + 4, (uint32_t)length);
    return buffer_append(body, header, sizeof(header)) && buffer_append(body, data, length);
}

bool put_bytes(struct buffer *body, uint16_t tag, const void *data, size_t length) {
    const uint8_t *at = data;
    while (length > FIELD_MAX) {
        if (!put_field(body, tag | FIELD_PART, at, FIELD_MAX))
            return false;
        at += FIELD_MAX;
        length -= FIELD_MAX;
    }
    return put_field(body, tag, at, length);
}

bool put_string(struct buffer *body, uint16_t tag, const char *text) {
    return put_bytes(body, tag, text, strlen(text));
}

bool put_number(struct buffer *body, uint16_t tag, uint64_t value) {
    uint8_t bytes[8];
    put_u64(bytes, value);
    return put_bytes(body, tag, bytes, sizeof(bytes));
}
