/*
 * A hostile host VM: the only program of a Linux domain that runs directly on
 * the host hypervisor and calls XENMEM_zerocopy_op itself, as a guest hypervisor
 * would, but wrongly.  First one call after the other whose refusal is known,
 * then what takes both sides, by turns, and at last random calls, while the
 * other side does the same.
 *
 * Options on the kernel's command line, all numbers:
 *   hostile.role=1|2        source or destination (XEN_ZEROCOPY_ROLE_*); 0: does nothing
 *   hostile.seconds=N       how long to go on at random
 *   hostile.commit=1        up to five times as long, until a session has been committed
 *   hostile.seed=N
 *   hostile.cpus=N          how many of them call at once, at random
 *   hostile.empty=1         instead of all that, hand memory over with no memory for page tables left
 *   hostile.policy=1        what only control domains may do is refused by a security policy
 *   hostile.rest=N          instead, leave a session in that state (XEN_ZEROCOPY_STATE_*), and see what becomes of it
 *                           when the other side dies
 *   hostile.revoked=1       instead, lend something, and see what a security policy then refuses
 * Waits for two sessions of 512 frames between the two, four of 1024 and one
 * of 1024 the other way round, one of 65536, more than either has, and a
 * channel, which is the last one, behind those of another size between each of
 * them and somebody else.
 *
 * Lines on the console: "HOSTILE FAIL what" for each finding, "HOSTILE RESTS"
 * when a session does, "HOSTILE ALONE" when the other side has shut down, at
 * last "HOSTILE DONE" with counters.
 *
 * The structures are those of xen/include/public/memory.h, written down again:
 * so a change of the interface is noticed here.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HYPERCALL_MEMORY_OP 12
#define HYPERCALL_VCPU_OP   24
#define HYPERCALL_DOMCTL    36
#define XENMEM_DECREASE_RESERVATION 1
#define XENMEM_POPULATE_PHYSMAP 6
#define XENMEM_ADD_TO_PHYSMAP 7
#define XENMEM_REMOVE_FROM_PHYSMAP 15
#define XENMEM_ZEROCOPY_OP  29
#define XENMAPSPACE_GRANT_TABLE 1
#define XENMAPSPACE_GMFN    2
#define VCPUOP_REGISTER_VCPU_INFO 10
#define DOMCTL_VERSION      0x15
#define DOMCTL_VMTRACE_OP   84
#define DOMCTL_ZEROCOPY     91
#define DOMCTL_ZEROCOPY_GUEST 92
#define DOMCTL_LAST_OP      10 /* of the latter, which has the most */
#define DOMID_SELF          0x7ff0
#define DOMID_IO            0x7ff1
#define DOMID_XEN           0x7ff2
#define DOMID_INVALID       0x7ff4
#define CPUID_HVM           0x40000004
#define CPUID_DOMID_PRESENT (1 << 4)
#define START_SHIFT         6

enum { OFFER = 1, ACCEPT, PREPARE, COMMIT, REVERT, ABORT, QUERY, CLOSE, NOTIFY };
enum { F_COPY = 1 << 1, F_COPY_BUSY = 1 << 2, F_NEXT = 1 << 3 };
enum { SOURCE = 1, DESTINATION = 2 };
enum { OPEN = 1, COMMITTING, COMMITTED, UNDOING, ABORTED };
enum { INFO_CHANNEL = 1, INFO_SRC_CLOSED = 2, INFO_DST_CLOSED = 4, INFO_SRC_DEAD = 8, INFO_DST_DEAD = 16 };
enum { VERSION = 2, MAX_EXTENTS = 512, DONE = 0, UNSEEN = 1 };

struct extent {
    uint64_t tag, gfn;
    uint32_t order;
    int32_t status;
};

struct info {
    uint32_t session;
    uint8_t state, role;
    uint16_t flags;
    uint32_t version, max_frames, offered, shared, copies, exchanged, copied;
    uint32_t calls, writes_4k, writes_2m, lost, reserved;
};

struct op {
    uint32_t op, session, flags, nr_extents;
    uint64_t extents;
    struct info info;
};

struct privcmd_hypercall {
    uint64_t op, arg[5];
};
#define IOCTL_HYPERCALL _IOC(_IOC_NONE, 'P', 0, sizeof(struct privcmd_hypercall))

/* Memory to play with: huge pages, which the kernel does not move. */
#define PAGE      4096UL
#define HUGE      (2UL << 20)
#define LENT      8 /* huge pages to pass around */
#define ORDERLY_SECONDS 2 /* to go through with a session, if the other side takes part */
#define KEPT      1 /* huge pages that are never offered nor accepted into */
#define HELD      1 /* huge pages of which the hypervisor has mapped something */
#define PER_HUGE  (HUGE / PAGE)
#define HELD_PAGE ((LENT + KEPT) * PER_HUGE)
#define LAST_VCPU 2
#define PAGES     ((LENT + KEPT + HELD) * PER_HUGE)

/* What each page begins with, twice, before it has been passed around: one of these, plus its number. */
#define MARK_SOURCE  0x5245564953554f53UL
#define MARK_KEPT    0x544550454b534921UL /* the source's, and never lent */
#define MARK_SECRET  0x544552434553414aUL /* the destination's */

static long role, seconds = 10, seed = 1, cpus = 1, empty, rest, commit, policy, revoked;
/* Sessions: one that nobody else works on at first, the other domain's one, the channel, the last one of all. */
static uint32_t mine, theirs, channel, last;
/* Sessions for both to work on by turns: the four of the same direction, and the other one. */
static uint32_t common[4], back;
/* A session that may have more frames than this domain has. */
#define VAST_FRAMES 65536
static uint32_t vast;
static int privcmd, failures, checks;
static unsigned long calls, done_extents;
/* How often a session was seen in each state, by any process. */
static unsigned long *ends;
static unsigned char *pool;
static uint64_t pool_gfn[LENT + KEPT + HELD];

static void say(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    printf("HOSTILE ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
}

static void __attribute__((noreturn)) give_up(const char *what)
{
    say("FAIL %s: %s", what, strerror(errno));
    sync();
    for (;;)
        pause();
}

/* Set-up: the first process of a kernel without anything else */

static void load_module(const char *path)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);

    /* privcmd's option: by default it refuses what isn't meant for device models. */
    if (file < 0 || (syscall(SYS_finit_module, file, "unrestricted=1", 0) && errno != EEXIST))
        give_up(path);
    close(file);
}

static void read_options(void)
{
    static const struct {
        const char *name;
        long *value;
    } options[] = {
        {"role", &role},
        {"seconds", &seconds},
        {"seed", &seed},
        {"cpus", &cpus},
        {"empty", &empty},
        {"rest", &rest},
        {"commit", &commit},
        {"policy", &policy},
        {"revoked", &revoked},
    };
    char line[4096];
    FILE *file = fopen("/proc/cmdline", "r");

    if (!file || !fgets(line, sizeof(line), file))
        give_up("/proc/cmdline");
    fclose(file);
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n"))
        for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++) {
            size_t length = strlen(options[i].name);

            if (!strncmp(word, "hostile.", 8) && !strncmp(word + 8, options[i].name, length) && word[8 + length] == '=')
                *options[i].value = atol(word + 8 + length + 1);
        }
}

static void start(void)
{
    char name[64], path[128];
    FILE *order;

    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    int console = open("/dev/console", O_RDWR);

    if (console >= 0) {
        dup2(console, 0);
        dup2(console, 1);
        dup2(console, 2);
    }
    order = fopen("/modules/order", "r");
    while (order && fscanf(order, "%63s", name) == 1) {
        snprintf(path, sizeof(path), "/modules/%s", name);
        load_module(path);
    }
    read_options();
    privcmd = open("/dev/xen/privcmd", O_RDWR | O_CLOEXEC);
    if (privcmd < 0)
        give_up("/dev/xen/privcmd");
}

static uint64_t gfn_of(const void *address)
{
    uint64_t entry = 0;
    int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    if (file < 0 || pread(file, &entry, sizeof(entry), (uintptr_t)address / PAGE * sizeof(entry)) != sizeof(entry))
        give_up("/proc/self/pagemap");
    close(file);
    return entry & ((1UL << 55) - 1);
}

static uint64_t *page(unsigned int number)
{
    return (uint64_t *)(pool + number * PAGE);
}

static void mark(unsigned int first, unsigned int count, uint64_t value)
{
    for (unsigned int i = first; i < first + count; i++) {
        page(i)[0] = value + i;
        page(i)[PAGE / 16] = value + i;
    }
}

static bool is_mark(uint64_t value, uint64_t mark)
{
    return value - mark < PAGES;
}

static void make_pool(void)
{
    pool = mmap(NULL, (LENT + KEPT + HELD) * HUGE, PROT_READ | PROT_WRITE,
                MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE, -1, 0);
    ends = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ends == MAP_FAILED)
        give_up("memory");
    if (pool == MAP_FAILED)
        give_up("huge pages (hugepages= on the command line)");
    mark(0, LENT * PER_HUGE, role == SOURCE ? MARK_SOURCE : MARK_SECRET);
    mark(LENT * PER_HUGE, KEPT * PER_HUGE, role == SOURCE ? MARK_KEPT : MARK_SECRET);
    mark(HELD_PAGE, HELD * PER_HUGE, MARK_SOURCE);
    for (unsigned int i = 0; i < LENT + KEPT + HELD; i++) {
        pool_gfn[i] = gfn_of(pool + i * HUGE);
        if (!pool_gfn[i] || pool_gfn[i] % PER_HUGE) {
            errno = EINVAL;
            give_up("a huge page that is not where it should be");
        }
    }
}

static uint64_t lent_gfn(unsigned int number)
{
    return pool_gfn[number / PER_HUGE] + number % PER_HUGE;
}

/* Calls */

static int hypercall(uint64_t number, uint64_t a, uint64_t b, uint64_t c)
{
    struct privcmd_hypercall call = {.op = number, .arg = {a, b, c}};
    int rc = ioctl(privcmd, IOCTL_HYPERCALL, &call);

    calls++;
    return rc < 0 ? -errno : rc;
}

static int zerocopy(struct op *op)
{
    return hypercall(HYPERCALL_MEMORY_OP, XENMEM_ZEROCOPY_OP, (uintptr_t)op, 0);
}

static int simple(uint32_t number, uint32_t session, uint32_t flags)
{
    struct op op = {.op = number, .session = session, .flags = flags};

    return zerocopy(&op);
}

static int query(uint32_t session, uint32_t flags, struct info *info)
{
    struct op op = {.op = QUERY, .session = session, .flags = flags};
    int rc = zerocopy(&op);

    *info = op.info;
    return rc;
}

static int extents(uint32_t number, uint32_t session, uint32_t flags, struct extent *list, uint32_t count)
{
    struct op op = {
        .op = number, .session = session, .flags = flags, .nr_extents = count, .extents = (uintptr_t)list,
    };

    return zerocopy(&op);
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* Waits until there are all sessions; the channel is the last one. */
static void find_sessions(void)
{
    double deadline = now() + 600;
    uint32_t both[2] = {0};
    unsigned int shared = 0;
    struct info info;
    int rc;

    while (!channel) {
        while (!(rc = query(last, F_NEXT, &info))) {
            last = info.session;
            if (info.flags & INFO_CHANNEL)
                channel = last;
            else if (info.max_frames == PER_HUGE)
                both[!!both[0]] = last;
            else if (info.max_frames == 2 * PER_HUGE && info.role != role)
                back = last;
            else if (info.max_frames == VAST_FRAMES)
                vast = last;
            else if (info.max_frames == 2 * PER_HUGE && shared < sizeof(common) / sizeof(*common))
                common[shared++] = last;
        }
        if (rc != -ENOENT || now() > deadline) {
            errno = -rc;
            give_up("looking for sessions");
        }
        usleep(10000);
    }
    mine = both[role - 1];
    theirs = both[2 - role];
    if (!mine || !theirs || !common[3] || !back || !vast) {
        errno = ENOENT;
        give_up("sessions");
    }
}

/* What is known beforehand */

static void expect(const char *what, int got, int wanted)
{
    checks++;
    if (got == wanted)
        return;
    failures++;
    say("FAIL %s: %d, not %d", what, got, wanted);
}

/* The status that one extent gets, or the call's own error. */
static int one(uint32_t number, uint32_t session, uint64_t tag, uint64_t gfn, uint32_t order)
{
    struct extent extent = {.tag = tag, .gfn = gfn, .order = order, .status = UNSEEN};

    return extents(number, session, 0, &extent, 1) ?: extent.status;
}

/* Frames of this domain that are no plain memory: its local APIC, and where its grant table is put. */
#define APIC_GFN    0xfee00UL
#define GRANT_GFN   (1UL << 21)
/* One that the kernel doesn't use, which has few grants. */
#define GRANT_FRAME 3

static int add_to_physmap(uint32_t space, uint64_t index, uint64_t gfn)
{
    struct {
        uint16_t domid, size;
        uint32_t space;
        uint64_t index, gfn;
    } map = {.domid = DOMID_SELF, .space = space, .index = index, .gfn = gfn};

    return hypercall(HYPERCALL_MEMORY_OP, XENMEM_ADD_TO_PHYSMAP, (uintptr_t)&map, 0);
}

static int map_grant_table(uint64_t gfn)
{
    return add_to_physmap(XENMAPSPACE_GRANT_TABLE, GRANT_FRAME, gfn);
}

static int remove_from_physmap(uint64_t gfn)
{
    struct {
        uint16_t domid;
        uint64_t gfn;
    } map = {.domid = DOMID_SELF, .gfn = gfn};

    return hypercall(HYPERCALL_MEMORY_OP, XENMEM_REMOVE_FROM_PHYSMAP, (uintptr_t)&map, 0);
}

/* Gives a frame up, or gets one: XENMEM_decrease_reservation, XENMEM_populate_physmap.  Returns how many it was. */
static int change_reservation(uint32_t number, uint64_t gfn)
{
    struct {
        uint64_t list, count;
        uint32_t order, flags;
        uint16_t domid;
    } change = {.list = (uintptr_t)&gfn, .count = 1, .domid = DOMID_SELF};

    return hypercall(HYPERCALL_MEMORY_OP, number, (uintptr_t)&change, 0);
}

/* With the arguments of each of the operations of XEN_DOMCTL_zerocopy, which control domains may call. */
static int domctl(uint32_t command, uint32_t version, uint16_t domid, uint32_t op, uint32_t session, uint16_t other)
{
    struct {
        uint32_t command, version;
        uint16_t domid, reserved[3];
        uint32_t op, session, flags, max_frames;
        uint16_t source, destination;
        uint8_t rest[128];
    } call = {
        .command = command, .version = version, .domid = domid,
        .op = op, .session = session, .max_frames = PER_HUGE, .destination = other,
    };

    return hypercall(HYPERCALL_DOMCTL, (uintptr_t)&call, 0, 0);
}

/* The version is looked at first, then whether there is such a domain, and only then who calls. */
static void known_of_domctls(uint32_t session)
{
    const int refused = policy ? -EACCES : -EPERM;
    static const uint32_t commands[] = {DOMCTL_VMTRACE_OP, DOMCTL_ZEROCOPY, DOMCTL_ZEROCOPY_GUEST};
    uint32_t present, vcpu, own, unused;

    __cpuid_count(CPUID_HVM, 0, present, vcpu, own, unused);
    expect("the own domain id by CPUID", !!(present & CPUID_DOMID_PRESENT), true);
    /* The source is started first, the destination next. */
    uint16_t other = role == SOURCE ? own + 1 : own - 1;
    struct {
        uint16_t domid;
        int error;
    } domains[] = {
        {0, refused}, {own, refused}, {other, refused}, {DOMID_SELF - 1, -ESRCH}, {DOMID_SELF, -ESRCH},
        {DOMID_IO, -ESRCH}, {DOMID_XEN, -ESRCH}, {UINT16_MAX, -ESRCH},
        /* Which stands for no domain, for those two that need not be about one. */
        {DOMID_INVALID, refused},
    };

    for (size_t i = 0; i < sizeof(commands) / sizeof(*commands); i++)
        for (size_t k = 0; k < sizeof(domains) / sizeof(*domains); k++)
            for (uint32_t op = 0; op <= DOMCTL_LAST_OP + 1; op++) {
                uint32_t command = commands[i];
                uint16_t domid = domains[k].domid;
                int error = command == DOMCTL_VMTRACE_OP && domid == DOMID_INVALID ? -ESRCH : domains[k].error;

                char what[80];

                snprintf(what, sizeof(what), "operation %u of domctl %u for domain %u", op, command, domid);
                expect(what, domctl(command, DOMCTL_VERSION, domid, op, session, other), error);
                expect("a domctl of another version",
                       domctl(command, DOMCTL_VERSION + 1, domid, op, session, other), -EACCES);
            }
}

static void known_to_anybody(uint32_t own)
{
    static struct extent many[MAX_EXTENTS + 1];
    struct op op = {.op = COMMIT, .session = own, .nr_extents = 1, .extents = (uintptr_t)many};
    struct info info;

    expect("QUERY of no session", query(0, 0, &info), 0);
    expect("version", info.version, VERSION);
    expect("QUERY of a session that does not exist", query(0xdeadbeef, 0, &info), -ENOENT);
    expect("QUERY of the own session", query(own, 0, &info), 0);
    expect("state", info.state, OPEN);
    expect("role", info.role, role);
    for (uint32_t session = 1, next; session <= last + 3; session = next + 1) {
        next = query(session - 1, F_NEXT, &info) ? last + 4 : info.session;
        for (; session < next; session++)
            for (uint32_t number = OFFER; number <= NOTIFY; number++)
                expect("an operation on another pair's session", simple(number, session, 0), -ENOENT);
    }
    expect("operation 0", simple(0, own, 0), -EINVAL);
    expect("operation 10", simple(NOTIFY + 1, own, 0), -EINVAL);
    expect("operation 2^32 - 1", simple(~0U, own, 0), -EINVAL);
    for (uint32_t number = OFFER; number <= NOTIFY; number++)
        expect("unknown flags", simple(number, own, 1U << 31), -EINVAL);
    expect("extents for COMMIT", zerocopy(&op), -EINVAL);
    op.op = role == SOURCE ? OFFER : ACCEPT;
    op.nr_extents = MAX_EXTENTS + 1;
    expect("513 extents", zerocopy(&op), -E2BIG);
    op.nr_extents = ~0U;
    expect("2^32 - 1 extents", zerocopy(&op), -E2BIG);
    op.nr_extents = 1;
    op.extents = 0x10;
    expect("extents at a bad address", zerocopy(&op), -EFAULT);
    op.extents = ~0UL - 8;
    expect("extents at the end of the address space", zerocopy(&op), -EFAULT);
    expect("a bad address", hypercall(HYPERCALL_MEMORY_OP, XENMEM_ZEROCOPY_OP, 0x10, 0), -EFAULT);
    op.nr_extents = 0;
    expect("going on behind the end",
           hypercall(HYPERCALL_MEMORY_OP, XENMEM_ZEROCOPY_OP | (0x3ffffffUL << START_SHIFT), (uintptr_t)&op, 0), 0);
    expect("a frame of the grant table at a place of its own", map_grant_table(GRANT_GFN), 0);
    expect("CLOSE while open", simple(CLOSE, own, 0), -EILSEQ);
    expect("NOTIFY without channel", simple(NOTIFY, own, 0), -EPERM);
    known_of_domctls(own);
}

/*
 * The kernel has put shared_info, which is the hypervisor's own memory, somewhere into the lowest 640 KiB.
 * All else there is plain memory.  None of it is accepted by anybody.
 */
static void offer_shared_info(uint32_t own)
{
    unsigned int refused = 0;

    for (uint64_t gfn = 1; gfn < 0xa0; gfn++) {
        int rc = one(OFFER, own, 4 * PER_HUGE + gfn, gfn, 0);

        if (rc == DONE)
            continue;
        expect("shared_info", rc, -EOPNOTSUPP);
        say("shared_info is frame %lu", (unsigned long)gfn);
        refused++;
    }
    expect("frames of the lowest 640 KiB that are not plain memory", refused, 1);
}

/* The same frames by one tag after the other, each of which is a record in the hypervisor's memory. */
static void offer_without_end(uint32_t session)
{
    long kib = (long)sysconf(_SC_PHYS_PAGES) * (PAGE >> 10);
    uint64_t tag = 0;
    int rc = DONE;

    for (; rc == DONE && tag < VAST_FRAMES; tag += PER_HUGE)
        rc = one(OFFER, session, tag, pool_gfn[1], 9);
    expect("OFFER of more than there is", rc, -ENOSPC);
    /* The kernel has a part of the memory for itself. */
    expect("OFFER of as much as there is", (long)(tag * (PAGE >> 10)) > kib, 1);
    expect("ABORT of that", simple(ABORT, session, 0), 0);
    expect("CLOSE of that", simple(CLOSE, session, 0), 0);
}

static void known_to_source(uint32_t own)
{
    static const uint32_t orders[] = {1, 8, 10, 18, 31, 32, 41, 64, 255, ~0U};
    uint64_t gfn = pool_gfn[0], other = pool_gfn[1];

    expect("ACCEPT by the source", one(ACCEPT, own, 0, gfn, 0), -EPERM);
    expect("REVERT by the source", simple(REVERT, own, 0), -EPERM);
    expect("COMMIT of nothing", simple(COMMIT, own, 0), -ENODATA);
    expect("COMMIT of a channel", simple(COMMIT, channel, 0), -EPERM);
    expect("2 MiB for a channel", one(OFFER, channel, 0, gfn, 9), -EINVAL);
    for (size_t i = 0; i < sizeof(orders) / sizeof(*orders); i++)
        expect("an unknown order", one(OFFER, own, 0, gfn, orders[i]), -EINVAL);
    expect("a tag that is not aligned", one(OFFER, own, 1, gfn, 9), -EINVAL);
    expect("a frame that is not aligned", one(OFFER, own, 0, gfn + 1, 9), -EINVAL);
    expect("a tag beyond the limit", one(OFFER, own, 2 * PER_HUGE + (1 << 21), gfn, 0), -EINVAL);
    expect("the largest tag", one(OFFER, own, ~0UL, gfn, 0), -EINVAL);
    expect("a frame beyond the address space", one(OFFER, own, 0, 1UL << 44, 0), -EINVAL);
    expect("a frame beyond the memory", one(OFFER, own, 0, 1UL << 24, 0), -EOPNOTSUPP);
    expect("2 MiB beyond the memory", one(OFFER, own, 0, 1UL << 24, 9), -EOPNOTSUPP);
    expect("a frame of the grant table", one(OFFER, own, 0, GRANT_GFN, 0), -EOPNOTSUPP);
    expect("the local APIC", one(OFFER, own, 0, APIC_GFN, 0), -EOPNOTSUPP);
    expect("OFFER", one(OFFER, own, 0, gfn, 0), DONE);
    expect("the same again", one(OFFER, own, 0, gfn, 0), DONE);
    expect("the same tag for another frame", one(OFFER, own, 0, other, 0), -EEXIST);
    expect("2 MiB over it", one(OFFER, own, 0, gfn, 9), -EEXIST);
    expect("more than the session's limit", one(OFFER, own, PER_HUGE, other, 9), -ENOSPC);
    expect("COMMIT of what is not accepted", simple(COMMIT, own, 0), -ENODATA);
    /* Until ABORT, the session has the frame that was there when it was offered. */
    expect("OFFER of a frame to be replaced", one(OFFER, own, 1, gfn + 1, 0), DONE);
    expect("giving it up", change_reservation(XENMEM_DECREASE_RESERVATION, gfn + 1), 1);
    expect("another one in its place", change_reservation(XENMEM_POPULATE_PHYSMAP, gfn + 1), 1);
    mark(1, 1, MARK_SOURCE);
    offer_shared_info(own);
    offer_without_end(vast);
}

static void known_to_destination(uint32_t own)
{
    expect("OFFER by the destination", one(OFFER, own, 0, pool_gfn[0], 0), -EPERM);
    expect("COMMIT by the destination", simple(COMMIT, own, 0), -EPERM);
    expect("REVERT while open", simple(REVERT, own, 0), -EILSEQ);
    expect("ACCEPT of what is not offered", one(ACCEPT, own, 0, pool_gfn[0], 0), -EAGAIN);
    expect("2 MiB from a channel", one(ACCEPT, channel, 0, pool_gfn[0], 9), -EINVAL);
    expect("a frame that is not aligned", one(ACCEPT, own, 0, pool_gfn[0] + 1, 9), -EINVAL);
    expect("a frame beyond the address space", one(ACCEPT, own, 0, 1UL << 44, 0), -EINVAL);
}

/* Ends the own session, then waits until the other side has done so, too. */
static void meet(void)
{
    uint16_t closed = role == SOURCE ? INFO_DST_CLOSED : INFO_SRC_CLOSED;
    double deadline = now() + 600;
    struct info info;

    expect("ABORT", simple(ABORT, mine, 0), 0);
    expect("ABORT again", simple(ABORT, mine, 0), 0);
    if (role == SOURCE)
        expect("COMMIT of what is aborted", simple(COMMIT, mine, 0), -ENOTCONN);
    expect("CLOSE", simple(CLOSE, mine, 0), 0);
    while (!query(theirs, 0, &info)) {
        /* It is gone when both have done all of CLOSE, which takes a moment after the flag is set. */
        if (info.flags & closed)
            simple(CLOSE, theirs, 0);
        if (now() > deadline) {
            errno = ETIMEDOUT;
            give_up("waiting for the other side");
        }
        usleep(10000);
    }
}

/* By turns: what takes both sides */

/* Waits until a session is in this state, has got that far, and has these flags. */
/* Between two looks at what is waited for. */
static void look_again(const char *what, double deadline, useconds_t microseconds)
{
    if (now() > deadline) {
        errno = ETIMEDOUT;
        give_up(what);
    }
    usleep(microseconds);
}

static void await(const char *what, uint32_t session, struct info wanted)
{
    double deadline = now() + 600;
    struct info info;

    while (query(session, 0, &info) || info.state != wanted.state || info.offered < wanted.offered ||
           info.shared < wanted.shared || (info.flags & wanted.flags) != wanted.flags)
        look_again(what, deadline, 1000);
}

/* What the other side has closed may still be tidied up for a moment. */
static void await_gone(uint32_t session)
{
    double deadline = now() + 60;
    struct info info;

    while (query(session, 0, &info) != -ENOENT)
        look_again("end of a session that both have closed", deadline, 1000);
}

static void expect_session(const char *what, uint32_t session, int state, int exchanged, int copied)
{
    struct info info;

    expect(what, query(session, 0, &info), 0);
    expect(what, info.state, state);
    expect(what, info.exchanged, exchanged);
    expect(what, info.copied, copied);
    expect(what, info.lost, 0);
}

static void expect_page(const char *what, unsigned int number, uint64_t value)
{
    uint64_t first = page(number)[0], second = page(number)[PAGE / 16];

    checks++;
    if (first == value && second == value)
        return;
    failures++;
    say("FAIL %s: page %u holds %016lx and %016lx, not %016lx", what, number, (unsigned long)first,
        (unsigned long)second, (unsigned long)value);
}

/* That a page holds what was in this page of the source. */
static void expect_mark(const char *what, unsigned int number, unsigned int source)
{
    expect_page(what, number, MARK_SOURCE + source);
}

/* Tags, and numbers of the source's pages, that are accepted into pages the other way round, one of them later. */
#define REVERSED_FIRST  16
#define REVERSED_LAST   23
#define REVERSED_LATER  19
/* One that is offered later. */
#define REVERSED_MORE   (REVERSED_LAST + 1)

static unsigned int reversed(unsigned int tag)
{
    return REVERSED_FIRST + REVERSED_LAST - tag;
}

/*
 * Have the hypervisor map a frame for good: as vcpu_info of the last vCPU, which the kernel never starts.  It then
 * has a reference and a type, as that of the VMCB of a nested guest, which cannot be named from here.
 */
static uint64_t held_gfn(void)
{
    struct {
        uint64_t gfn;
        uint32_t offset, reserved;
    } place = {.gfn = pool_gfn[LENT + KEPT], .offset = 1024};

    expect("vcpu_info of the last vCPU",
           hypercall(HYPERCALL_VCPU_OP, VCPUOP_REGISTER_VCPU_INFO, LAST_VCPU, (uintptr_t)&place), 0);
    return place.gfn;
}

static void together_as_source(uint32_t first, uint32_t second, uint32_t late)
{
    expect("OFFER of a frame", one(OFFER, second, 3, lent_gfn(3), 0), DONE);
    expect("OFFER of the same frame to another session", one(OFFER, first, 3, lent_gfn(3), 0), DONE);
    expect("OFFER of a frame by one tag", one(OFFER, first, 0, lent_gfn(0), 0), DONE);
    expect("OFFER of the same frame by another tag", one(OFFER, first, 2, lent_gfn(0), 0), DONE);
    expect("OFFER of a frame that the hypervisor has mapped", one(OFFER, first, 4, held_gfn(), 0), DONE);
    expect("OFFER of an ordinary frame", one(OFFER, first, 1, lent_gfn(1), 0), DONE);

    await("ACCEPT", first, (struct info){.state = OPEN, .shared = 5});
    await("ACCEPT of the other session", second, (struct info){.state = OPEN, .shared = 1});
    expect("ACCEPT into a frame that is offered", one(ACCEPT, back, 0, lent_gfn(0), 0), -EBUSY);
    expect("ABORT of the way back", simple(ABORT, back, 0), 0);

    expect("COMMIT of frames with further references", simple(COMMIT, first, 0), -EBUSY);
    expect_session("exchanged is the ordinary one alone", first, COMMITTING, 1, 0);
    await("ABORT of the other session", second, (struct info){.state = ABORTED});
    expect("COMMIT when only one session has the frame", simple(COMMIT, first, 0), -EBUSY);
    expect_session("that one is exchanged, too", first, COMMITTING, 2, 0);
    expect("COMMIT with copies", simple(COMMIT, first, F_COPY_BUSY), 0);
    expect_session("committed", first, COMMITTED, 2, 3);
    expect_page("what came in exchange", 1, 0);
    expect_mark("what was copied", 0, 0);

    expect("COMMIT after COMMITTED", simple(COMMIT, first, 0), 0);
    expect("COMMIT with copies after COMMITTED", simple(COMMIT, first, F_COPY_BUSY), 0);
    expect("OFFER after COMMITTED", one(OFFER, first, 5, lent_gfn(5), 0), -EISCONN);
    expect("ABORT after COMMITTED", simple(ABORT, first, 0), -EISCONN);
    expect("REVERT after COMMITTED by the source", simple(REVERT, first, 0), -EPERM);
    expect_session("still committed", first, COMMITTED, 2, 3);
    /* The other side waits for this. */
    expect("CLOSE of what is aborted", simple(CLOSE, second, 0), 0);

    await("REVERT", first, (struct info){.state = ABORTED});
    expect("COMMIT after REVERT", simple(COMMIT, first, 0), -ENOTCONN);
    expect("OFFER after REVERT", one(OFFER, first, 5, lent_gfn(5), 0), -ENOTCONN);
    expect_mark("what was given back", 1, 1);
    expect_mark("what two sessions had", 3, 3);

    for (unsigned int tag = REVERSED_FIRST; tag <= REVERSED_LAST; tag++)
        expect("OFFER of some in a row", one(OFFER, late, tag, lent_gfn(tag), 0), DONE);
    expect("OFFER of what was given back", one(OFFER, late, 1, lent_gfn(1), 0), DONE);
    await("ACCEPT of all but one", late, (struct info){.state = OPEN, .shared = 8});
    expect("CLOSE by both", simple(CLOSE, first, 0), 0);
    expect("CLOSE of what both have closed", simple(CLOSE, first, 0), -ENOENT);
    expect("COMMIT when one has been left out", simple(COMMIT, late, 0), -ENODATA);
    /* The other side waits for this. */
    expect("OFFER of one more", one(OFFER, late, REVERSED_MORE, lent_gfn(REVERSED_MORE), 0), DONE);
    await("ACCEPT of all", late, (struct info){.state = OPEN, .shared = 10});
    expect("COMMIT of it", simple(COMMIT, late, 0), 0);
    expect("CLOSE of it", simple(CLOSE, late, 0), 0);
}

/* In one call, as those of one call are looked up first and put into place later. */
static void accept_reversed(uint32_t session)
{
    static struct extent list[REVERSED_LAST - REVERSED_FIRST + 1];
    unsigned int count = 0;

    for (unsigned int tag = REVERSED_LAST; tag >= REVERSED_FIRST; tag--)
        if (tag != REVERSED_LATER)
            list[count++] = (struct extent){.tag = tag, .gfn = lent_gfn(reversed(tag)), .status = UNSEEN};
    expect("ACCEPT the other way round", extents(ACCEPT, session, 0, list, count), 0);
    for (unsigned int i = 0; i < count; i++)
        expect("ACCEPT of each of them", list[i].status, DONE);
}

static void together_as_destination(uint32_t first, uint32_t second, uint32_t late)
{
    static const unsigned int handed_over[] = {0, 1, 0, 3, HELD_PAGE};

    await("OFFER", first, (struct info){.state = OPEN, .offered = 5});
    expect("ACCEPT into the grant table", one(ACCEPT, first, 0, GRANT_GFN, 0), -EOPNOTSUPP);
    expect("ACCEPT into the local APIC", one(ACCEPT, first, 0, APIC_GFN, 0), -EOPNOTSUPP);
    expect("ACCEPT of 2 MiB for 4 KiB", one(ACCEPT, first, 0, pool_gfn[0], 9), -EXDEV);
    expect("ACCEPT", one(ACCEPT, first, 0, lent_gfn(0), 0), DONE);
    expect("the same again", one(ACCEPT, first, 0, lent_gfn(0), 0), DONE);
    expect("the same tag into another frame", one(ACCEPT, first, 0, lent_gfn(1), 0), -EEXIST);
    expect("another tag into the same frame", one(ACCEPT, first, 1, lent_gfn(0), 0), -EEXIST);
    expect("another session into the same frame", one(ACCEPT, second, 3, lent_gfn(0), 0), -EEXIST);
    expect("OFFER of a frame that is borrowed", one(OFFER, back, 0, lent_gfn(0), 0), -EOPNOTSUPP);
    expect("OFFER of an own frame", one(OFFER, back, 0, lent_gfn(8), 0), DONE);
    expect("ACCEPT into a frame that is offered", one(ACCEPT, first, 1, lent_gfn(8), 0), -EBUSY);
    for (unsigned int tag = 1; tag < 5; tag++)
        expect("ACCEPT of the others", one(ACCEPT, first, tag, lent_gfn(tag), 0), DONE);
    expect("ACCEPT of the other session", one(ACCEPT, second, 3, lent_gfn(5), 0), DONE);
    expect_mark("what is borrowed", 1, 1);

    await("COMMIT", first, (struct info){.state = COMMITTING});
    expect("ABORT while COMMITTING", simple(ABORT, first, 0), -EISCONN);
    expect("REVERT while COMMITTING", simple(REVERT, first, 0), -EILSEQ);
    expect("CLOSE while COMMITTING", simple(CLOSE, first, 0), -EILSEQ);
    expect("ACCEPT while COMMITTING", one(ACCEPT, first, 0, lent_gfn(0), 0), -EISCONN);
    expect("ABORT of the other session", simple(ABORT, second, 0), 0);

    await("COMMIT of the rest", second, (struct info){.state = ABORTED, .flags = INFO_SRC_CLOSED});
    expect_session("committed", first, COMMITTED, 2, 3);
    expect("ABORT after COMMITTED", simple(ABORT, first, 0), -EISCONN);
    expect("ACCEPT after COMMITTED", one(ACCEPT, first, 0, lent_gfn(0), 0), -EISCONN);
    expect("COMMIT after COMMITTED by the destination", simple(COMMIT, first, 0), -EPERM);
    for (unsigned int tag = 0; tag < 5; tag++)
        expect_mark("what has been handed over", tag, handed_over[tag]);
    expect_page("what the other session has given back", 5, 0);

    expect("REVERT after COMMITTED", simple(REVERT, first, 0), 0);
    expect_session("reverted", first, ABORTED, 0, 3);
    expect("REVERT again", simple(REVERT, first, 0), 0);
    expect("ABORT after REVERT", simple(ABORT, first, 0), 0);
    expect_page("the own frame instead of what was given back", 1, 0);
    expect("CLOSE of the other session", simple(CLOSE, second, 0), 0);
    expect("CLOSE after REVERT", simple(CLOSE, first, 0), 0);
    expect("CLOSE again", simple(CLOSE, first, 0), 0);

    await("OFFER of what was given back", late, (struct info){.state = OPEN, .offered = 9});
    accept_reversed(late);
    expect("ACCEPT of it", one(ACCEPT, late, 1, lent_gfn(1), 0), DONE);
    await("OFFER of one more", late, (struct info){.state = OPEN, .offered = 10});
    expect("ACCEPT of that", one(ACCEPT, late, REVERSED_MORE, lent_gfn(REVERSED_MORE), 0), DONE);
    expect("ACCEPT of what was left out",
           one(ACCEPT, late, REVERSED_LATER, lent_gfn(reversed(REVERSED_LATER)), 0), DONE);
    await("CLOSE of it", late, (struct info){.state = COMMITTED, .flags = INFO_SRC_CLOSED});
    expect("REVERT after CLOSE by the source", simple(REVERT, late, 0), -EILSEQ);
    expect("ABORT after CLOSE by the source", simple(ABORT, late, 0), -EISCONN);
    expect_session("committed for good", late, COMMITTED, 10, 0);
    expect_mark("what was given back, then handed over", 1, 1);
    expect_mark("what was offered later", REVERSED_MORE, REVERSED_MORE);
    for (unsigned int tag = REVERSED_FIRST; tag <= REVERSED_LAST; tag++)
        expect_mark("what was accepted the other way round", reversed(tag), tag);
    expect("CLOSE of it", simple(CLOSE, late, 0), 0);
}

/*
 * Each side gets rid of frames that it has lent or borrowed. The source may: the session has references to the frames,
 * and copies what cannot be exchanged any more. The destination may not.
 */
#define REMOVED 32 /* the first tag, and number of both sides' pages, of four */

static void removing_as_source(uint32_t session)
{
    for (unsigned int tag = REMOVED; tag < REMOVED + 3; tag++)
        expect("OFFER of a frame to be removed", one(OFFER, session, tag, lent_gfn(tag), 0), DONE);
    expect("giving up what is offered", change_reservation(XENMEM_DECREASE_RESERVATION, lent_gfn(REMOVED)), 1);
    expect("removing what is offered", remove_from_physmap(lent_gfn(REMOVED + 1)), 0);
    /* The other side waits for this. */
    expect("OFFER of a frame that stays", one(OFFER, session, REMOVED + 3, lent_gfn(REMOVED + 3), 0), DONE);
    await("ACCEPT", session, (struct info){.state = OPEN, .shared = 4});
    expect("replacing what is lent", map_grant_table(lent_gfn(REMOVED + 2)), 0);

    expect("COMMIT of frames that are not there any more", simple(COMMIT, session, 0), -EBUSY);
    expect_session("exchanged is the one that has stayed", session, COMMITTING, 1, 0);
    expect("COMMIT with copies", simple(COMMIT, session, F_COPY_BUSY), 0);
    expect_session("the others are copied", session, COMMITTED, 1, 3);
    expect_page("what came in exchange", REMOVED + 3, 0);
    expect("CLOSE", simple(CLOSE, session, 0), 0);

    expect("the grant table back in its place", map_grant_table(GRANT_GFN), 0);
    for (unsigned int tag = REMOVED; tag < REMOVED + 3; tag++)
        expect("other frames in place of those", change_reservation(XENMEM_POPULATE_PHYSMAP, lent_gfn(tag)), 1);
}

static void removing_as_destination(uint32_t session)
{
    await("OFFER", session, (struct info){.state = OPEN, .offered = 4});
    for (unsigned int tag = REMOVED; tag < REMOVED + 3; tag++) {
        uint64_t gfn = lent_gfn(tag);

        expect("ACCEPT, whatever has become of it", one(ACCEPT, session, tag, gfn, 0), DONE);
        expect("giving up what is borrowed", change_reservation(XENMEM_DECREASE_RESERVATION, gfn), 0);
        expect("removing what is borrowed", remove_from_physmap(gfn), -ENOENT);
        expect("a frame of the grant table in its place", map_grant_table(gfn), -ENXIO);
        expect("an own frame in its place", add_to_physmap(XENMAPSPACE_GMFN, lent_gfn(REMOVED + 3), gfn), -ENXIO);
        expect("moving what is borrowed", add_to_physmap(XENMAPSPACE_GMFN, gfn, GRANT_GFN + 1), -EINVAL);
        expect_mark("what is still borrowed", tag, tag);
    }
    expect("ACCEPT of what stays", one(ACCEPT, session, REMOVED + 3, lent_gfn(REMOVED + 3), 0), DONE);

    await("COMMIT", session, (struct info){.state = COMMITTED, .flags = INFO_SRC_CLOSED});
    expect_session("committed", session, COMMITTED, 1, 3);
    for (unsigned int tag = REMOVED; tag < REMOVED + 4; tag++)
        expect_mark("what has been handed over", tag, tag);
    expect("CLOSE", simple(CLOSE, session, 0), 0);
}

static void together(void)
{
    (role == SOURCE ? together_as_source : together_as_destination)(common[0], common[1], common[2]);
    (role == SOURCE ? removing_as_source : removing_as_destination)(common[3]);
    await("ABORT of the way back", back, (struct info){.state = ABORTED});
    expect("CLOSE of the way back", simple(CLOSE, back, 0), 0);
    mark(0, LENT * PER_HUGE, role == SOURCE ? MARK_SOURCE : MARK_SECRET);
}

/* One of the two dies while a session rests in a state */

static void rest_as_source(uint32_t session)
{
    expect("OFFER of an ordinary frame", one(OFFER, session, 0, lent_gfn(0), 0), DONE);
    expect("OFFER of a frame that the hypervisor has mapped", one(OFFER, session, 1, held_gfn(), 0), DONE);
    await("ACCEPT", session, (struct info){.state = OPEN, .shared = 2});
    if (rest != OPEN)
        expect("COMMIT of a frame that is mapped", simple(COMMIT, session, 0), -EBUSY);
    if (rest == COMMITTED)
        expect("COMMIT with copies", simple(COMMIT, session, F_COPY_BUSY), 0);
}

static void rest_as_destination(uint32_t session)
{
    await("OFFER", session, (struct info){.state = OPEN, .offered = 2});
    for (unsigned int tag = 0; tag < 2; tag++)
        expect("ACCEPT", one(ACCEPT, session, tag, lent_gfn(tag), 0), DONE);
    await("COMMIT", session, (struct info){.state = rest});
}

/*
 * As long as it is shut down only, all stays as it is.  When it is destroyed, a session that is COMMITTING goes the way
 * on which the guest survives: its state has arrived at the destination already.
 */
static void see_the_other_one_die(uint32_t session)
{
    bool source = role == SOURCE, handed_over = rest == COMMITTED || (rest == COMMITTING && !source);

    say("RESTS");
    await("the other one's end", session,
          (struct info){.state = rest, .flags = source ? INFO_DST_DEAD : INFO_SRC_DEAD});
    say("ALONE");
    await("what becomes of the session", session,
          (struct info){.state = handed_over ? COMMITTED : ABORTED,
                        .flags = source ? INFO_DST_CLOSED : INFO_SRC_CLOSED});
    if (source) {
        expect_page("what was lent", 0, handed_over ? 0 : MARK_SOURCE);
        expect_mark("what was mapped", HELD_PAGE, HELD_PAGE);
    } else {
        expect_page("what was borrowed", 0, handed_over ? MARK_SOURCE : 0);
        expect_page("what was mapped at the source", 1, handed_over ? MARK_SOURCE + HELD_PAGE : 0);
    }
    expect("CLOSE", simple(CLOSE, session, 0), 0);
    await_gone(session);
    expect("CLOSE of what is gone", simple(CLOSE, session, 0), -ENOENT);
}

/* A security policy forbids what has begun */

/* Calls until it is the policy that refuses it, not the order, which is wrong. */
static void await_refusal(uint32_t number, uint32_t session)
{
    double deadline = now() + 600;

    say("RESTS");
    while (one(number, session, 0, lent_gfn(0), 1) != -EACCES)
        look_again("refusal by the policy", deadline, 100000);
    say("REFUSED");
}

/* `done` has nothing lent: its end tells the source that the destination has seen everything. */
static void revoked_as_source(uint32_t session, uint32_t done)
{
    expect("OFFER of an ordinary frame", one(OFFER, session, 0, lent_gfn(0), 0), DONE);
    await("ACCEPT", session, (struct info){.state = OPEN, .shared = 1});
    await_refusal(OFFER, session);
    expect("OFFER", one(OFFER, session, 1, lent_gfn(1), 0), -EACCES);
    expect("NOTIFY", simple(NOTIFY, channel, 0), -EACCES);
    expect("COMMIT", simple(COMMIT, session, 0), -EACCES);
    expect_session("as before", session, OPEN, 0, 0);
    expect_page("what is lent", 0, MARK_SOURCE);
    await("the destination", done, (struct info){.state = ABORTED});
    expect("ABORT", simple(ABORT, session, 0), 0);
    expect_page("what was lent", 0, MARK_SOURCE);
    expect("CLOSE", simple(CLOSE, session, 0), 0);
}

static void revoked_as_destination(uint32_t session, uint32_t done)
{
    await("OFFER", session, (struct info){.state = OPEN, .offered = 1});
    expect("ACCEPT", one(ACCEPT, session, 0, lent_gfn(0), 0), DONE);
    await_refusal(ACCEPT, session);
    expect("NOTIFY", simple(NOTIFY, channel, 0), -EACCES);
    expect_mark("what is borrowed", 0, 0);
    expect("ABORT", simple(ABORT, done, 0), 0);
    await("the source", session, (struct info){.state = ABORTED});
    expect_page("what was borrowed", 0, 0);
    expect("CLOSE", simple(CLOSE, session, 0), 0);
}

/* With an empty pool for page tables */

/* Puts something into one GiB after the other: the page tables for it stay. */
static void use_up_page_tables(void)
{
    uint64_t gfn = 1UL << 22;
    int rc = 0;

    for (; !rc && gfn < 1UL << 36; gfn += 1UL << 18)
        rc = map_grant_table(gfn);
    expect("page tables without end", rc, -ENOMEM);
}

static void empty_as_source(uint32_t small, uint32_t large)
{
    expect("OFFER of 4 KiB while there is memory", one(OFFER, small, 0, lent_gfn(0), 0), DONE);
    use_up_page_tables();
    expect("OFFER of 4 KiB out of 2 MiB", one(OFFER, small, 1, pool_gfn[1], 0), -ENOMEM);
    expect("OFFER of 2 MiB", one(OFFER, large, PER_HUGE, pool_gfn[1], 9), DONE);
    expect("OFFER of 2 MiB with a frame that the hypervisor has mapped", one(OFFER, large, 0, held_gfn(), 9), DONE);

    await("ACCEPT", large, (struct info){.state = OPEN, .shared = 2 * PER_HUGE});
    expect("COMMIT", simple(COMMIT, large, 0), -EBUSY);
    expect_session("exchanged is what nobody has mapped", large, COMMITTING, PER_HUGE, 0);
    expect("COMMIT with copies", simple(COMMIT, large, F_COPY_BUSY), 0);
    /* It cannot be split. */
    expect_session("the other 2 MiB are copied as a whole", large, COMMITTED, PER_HUGE, PER_HUGE);
    expect_page("what came in exchange", PER_HUGE, 0);
    expect_mark("what was copied", HELD_PAGE, HELD_PAGE);
    expect("CLOSE", simple(CLOSE, large, 0), 0);
}

static void empty_as_destination(uint32_t small, uint32_t large)
{
    use_up_page_tables();
    await("OFFER", large, (struct info){.state = OPEN, .offered = 2 * PER_HUGE});
    expect("ACCEPT of 4 KiB out of the source's 2 MiB", one(ACCEPT, large, PER_HUGE, pool_gfn[1], 0), -ENOMEM);
    expect("ACCEPT of 4 KiB into own 2 MiB", one(ACCEPT, small, 0, pool_gfn[1], 0), -ENOMEM);
    expect_page("a frame that was not lent", PER_HUGE, MARK_SECRET + PER_HUGE);
    expect("ABORT", simple(ABORT, small, 0), 0);
    for (unsigned int tag = 0; tag < 2 * PER_HUGE; tag += PER_HUGE)
        expect("ACCEPT of 2 MiB", one(ACCEPT, large, tag, lent_gfn(tag), 9), DONE);

    await("COMMIT", large, (struct info){.state = COMMITTED, .flags = INFO_SRC_CLOSED});
    expect_session("committed", large, COMMITTED, PER_HUGE, PER_HUGE);
    for (unsigned int number = 0; number < 2 * PER_HUGE; number++)
        expect_mark("what has been handed over", number, number < PER_HUGE ? HELD_PAGE + number : number);
    expect("CLOSE", simple(CLOSE, large, 0), 0);
}

/* At random */

static uint64_t random_state;

static uint32_t rnd(uint32_t limit)
{
    /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 2685821657736338717UL) >> 32) % limit;
}

/* Marks that must not be seen here, wherever the frames come from: of any page, as tags are mixed on purpose. */
static void look(void)
{
    for (unsigned int i = 0; i < LENT * PER_HUGE; i++)
        for (unsigned int half = 0; half < 2; half++) {
            uint64_t value = *(volatile uint64_t *)&page(i)[half * (PAGE / 16)];

            if (is_mark(value, role == SOURCE ? MARK_SECRET : MARK_KEPT)) {
                failures++;
                say("FAIL page %u holds the other domain's secret", i);
                page(i)[half * (PAGE / 16)] = 0;
            } else if (value && !is_mark(value, MARK_SOURCE) && !is_mark(value, MARK_SECRET)) {
                failures++;
                say("FAIL page %u holds %016lx", i, (unsigned long)value);
                page(i)[half * (PAGE / 16)] = 0;
            }
        }
    for (unsigned int i = LENT * PER_HUGE; i < (LENT + KEPT) * PER_HUGE; i++)
        for (unsigned int half = 0; half < 2; half++)
            if (page(i)[half * (PAGE / 16)] != (role == SOURCE ? MARK_KEPT : MARK_SECRET) + i) {
                failures++;
                say("FAIL page %u, which was never passed on, has changed", i);
                mark(i, 1, role == SOURCE ? MARK_KEPT : MARK_SECRET);
            }
}

static void pass_around(uint32_t session, bool is_channel)
{
    static struct extent list[64];
    uint32_t flags = role == DESTINATION && rnd(4) == 0 ? F_COPY : 0;
    unsigned int count = 1 + rnd(64), whole = rnd(3);

    for (unsigned int i = 0; i < count; i++) {
        unsigned int frame = rnd(LENT * PER_HUGE), order = !is_channel && whole && rnd(4) ? 9 : 0;

        if (order)
            frame -= frame % PER_HUGE;
        list[i] = (struct extent){
            /* Mostly what both sides agree on, so that much of it succeeds. */
            .tag = rnd(8) ? frame : rnd(LENT) * PER_HUGE,
            .gfn = rnd(64) ? lent_gfn(frame) : ((uint64_t)rnd(~0U) << rnd(20)),
            .order = rnd(100) ? order : rnd(64),
            .status = rnd(50) ? UNSEEN : DONE,
        };
        /* Never the kernel's own memory: losing that would only end the game. */
        if (list[i].gfn < (1UL << 20) && list[i].gfn != lent_gfn(frame))
            list[i].gfn += 1UL << 20;
    }
    extents(role == SOURCE ? OFFER : ACCEPT, session, flags, list, count);
    for (unsigned int i = 0; i < count; i++)
        done_extents += list[i].status == DONE;
}

/* Offers, or accepts, all that there is to pass around, as a well-behaved host VM does. */
static void pass_all(uint32_t op, uint32_t session)
{
    static struct extent small[PER_HUGE];

    for (unsigned int i = 0; i < LENT; i++) {
        uint64_t gfn = role == SOURCE ? lent_gfn(i * PER_HUGE) : pool_gfn[i];

        if (one(op, session, i * PER_HUGE, gfn, 9) == DONE) {
            done_extents++;
            continue;
        }
        for (unsigned int k = 0; k < PER_HUGE; k++)
            small[k] = (struct extent){.tag = i * PER_HUGE + k, .gfn = gfn + k, .status = UNSEEN};
        extents(op, session, op == ACCEPT && rnd(2) ? F_COPY : 0, small, PER_HUGE);
        for (unsigned int k = 0; k < PER_HUGE; k++)
            done_extents += small[k].status == DONE;
    }
}

/* Of the sessions that pass something on the one that was begun last, or 0. */
static uint32_t newest(void)
{
    uint32_t session = 0, found = 0;
    struct info info;

    while (!query(session, F_NEXT, &info)) {
        session = info.session;
        if (info.state == OPEN && !(info.flags & INFO_CHANNEL))
            found = session;
    }
    return found;
}

/*
 * Goes through with a session first: at random hardly any gets to its end before one of the two aborts it. Both wait
 * for each other in the newest one only, so that they wait in the same.
 */
static void behave(uint32_t session)
{
    double end = now() + ORDERLY_SECONDS;
    struct info info;

    if (role == SOURCE)
        pass_all(OFFER, session);
    do {
        if (role == DESTINATION)
            pass_all(ACCEPT, session);
        else if (simple(COMMIT, session, 0) != -ENODATA)
            break;
    } while (now() < end && !query(session, 0, &info) && info.state == OPEN);
}

static void act(const struct info *info)
{
    uint32_t session = info->session, dice = rnd(100);
    bool is_channel = info->flags & INFO_CHANNEL;

    if (dice < 50)
        pass_around(session, is_channel);
    else if (dice < 80 && role == SOURCE)
        simple(COMMIT, session, rnd(2) ? F_COPY_BUSY : 0);
    else if (dice < 80 && !is_channel)
        pass_all(ACCEPT, session);
    else if (dice < 83)
        simple(REVERT, session, 0);
    else if (dice < 84)
        simple(ABORT, session, 0);
    else if (dice < 92)
        simple(CLOSE, session, 0);
    else if (dice < 96)
        simple(PREPARE, session, 0);
    else
        simple(rnd(12), rnd(4) ? session : rnd(~0U), rnd(2) ? 0 : rnd(32));
}

static void at_random(long cpu)
{
    double end = now() + seconds;
    uint32_t latest = 0;
    bool used = true;
    /* Exclusive while marks are put: no other process may accept or offer then. */
    int turn = open("/turn", O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    if (turn < 0)
        give_up("/turn");
    random_state = (uint64_t)(seed + 1000 * cpu) * 0x9e3779b97f4a7c15UL + role;
    while (now() < end || (commit && !cpu && !ends[COMMITTED] && now() < end + 4 * seconds)) {
        uint32_t session = 0, orderly = newest();
        struct info info, after;

        flock(turn, LOCK_SH);
        while (!query(session, F_NEXT, &info)) {
            session = info.session;
            used = true;
            /* Over for us, while the other one has not closed it: hardly worth a call. */
            if ((info.flags & (role == SOURCE ? INFO_SRC_CLOSED : INFO_DST_CLOSED)) && rnd(50))
                continue;
            if (session == orderly && session > latest) {
                latest = session;
                behave(session);
                if (!query(session, 0, &after))
                    info = after;
            }
            ends[info.state <= ABORTED ? info.state : 0]++;
            /* What is finished makes room for something new. */
            if (info.state == COMMITTED || info.state == ABORTED)
                simple(rnd(3) ? CLOSE : role == DESTINATION ? REVERT : ABORT, session, 0);
            for (unsigned int i = rnd(8); i--;)
                act(&info);
        }
        look();
        /* Nobody else has any of it: put new marks where the last round has left none. */
        if (!session && used && !flock(turn, LOCK_EX) && query(0, F_NEXT, &info)) {
            mark(0, LENT * PER_HUGE, role == SOURCE ? MARK_SOURCE : MARK_SECRET);
            used = false;
        }
        flock(turn, LOCK_UN);
    }
    close(turn);
}

/* A process for each CPU, all with the same memory and sessions. */
static void all_at_random(void)
{
    long cpu = 1;
    pid_t child = 1;
    int status;

    for (; cpu < cpus && child; cpu += !!child)
        if ((child = fork()) < 0)
            give_up("fork");
    if (!child) {
        failures = calls = done_extents = 0;
        at_random(cpu);
        say("CHILD calls=%lu extents=%lu committed=%lu", calls, done_extents, ends[COMMITTED]);
        _exit(!!failures);
    }
    at_random(0);
    while (wait(&status) > 0)
        if (status) {
            failures++;
            say("FAIL a process has ended with status %d", status);
        }
}

int main(void)
{
    start();
    if (!role)
        for (;;)
            pause();
    make_pool();
    find_sessions();
    if (empty) {
        (role == SOURCE ? empty_as_source : empty_as_destination)(common[0], common[1]);
    } else if (revoked) {
        (role == SOURCE ? revoked_as_source : revoked_as_destination)(common[0], common[1]);
    } else if (rest) {
        (role == SOURCE ? rest_as_source : rest_as_destination)(common[0]);
        see_the_other_one_die(common[0]);
    } else {
        known_to_anybody(mine);
        if (role == SOURCE)
            known_to_source(mine);
        else
            known_to_destination(mine);
        meet();
        together();
    }
    say("CHECKED checks=%d failures=%d", checks, failures);
    if (!empty && !rest && !revoked)
        all_at_random();
    say("DONE checks=%d failures=%d calls=%lu extents=%lu open=%lu committed=%lu aborted=%lu", checks, failures, calls,
        done_extents, ends[OPEN], ends[COMMITTED], ends[ABORTED]);
    for (;;)
        pause();
}
