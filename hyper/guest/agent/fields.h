/* Fields of a message's body, see PROTOCOL.md. No I/O. */
#ifndef AGENT_FIELDS_H
#define AGENT_FIELDS_H

#include "util.h"

enum {
    FIELD_HEADER = 8,
    FIELD_MAX = 32768,
    FIELD_MORE = 0xffff,
    FIELD_PART = 0x8000,
};

struct field {
    uint16_t tag;
    uint8_t *data;
    size_t length;
};

struct fields {
    uint8_t *at;
    size_t left;
};

/* Joins the parts of split values in place, so that each value is one field; false when the body is no sequence of fields. */
bool fields_open(struct fields *f, uint8_t *body, size_t length);
/* The next field; false at the end. */
bool fields_next(struct fields *f, struct field *field);
/* Whether a frame's body ends with MORE. */
bool fields_end_with_more(const uint8_t *body, size_t length);

bool field_number(const struct field *field, uint64_t *value);
/* A new string; NULL when the value has a NUL byte in it, or without memory. */
char *field_string(const struct field *field);

/* Appending to a body; false without memory. */
bool put_bytes(struct buffer *body, uint16_t tag, const void *data, size_t length);
bool put_string(struct buffer *body, uint16_t tag, const char *text);
bool put_number(struct buffer *body, uint16_t tag, uint64_t value);

#endif
