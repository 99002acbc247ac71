/* Writes a numbered sequence to a disk, each record durable before the next,
 * and checks such a sequence afterwards.
 *
 * The records lie in a ring of 512-byte slots that exists before the first
 * write, so that a write never changes file system metadata. A record tells
 * its number and the size of the ring; hence the checker needs no file
 * system: it finds the records in a ring file as well as in the raw image of
 * the disk that the file is on. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define RECORD 512
#define CHUNK (256 * RECORD)
#define MAX_SLOTS (1 << 24)
#define MAX_RANGES 8

struct record {
    char magic[8];
    uint64_t sequence; /* 0: slot never written */
    uint64_t slots;
    int64_t realtime;  /* nanoseconds */
    int64_t boottime;
    char boot_id[40];
    uint8_t filler[RECORD - 8 * 5 - 40 - 8];
    uint64_t checksum;
};
_Static_assert(sizeof(struct record) == RECORD, "a record is a sector");

static const char magic[8] = "vmbeamDS";

static uint64_t checksum(const struct record *record)
{
    uint64_t words[RECORD / 8 - 1];

    memcpy(words, record, sizeof words);
    return checksum_words(0, words, RECORD / 8 - 1);
}

static void make(struct record *record, uint64_t sequence, uint64_t slots, const char *boot_id)
{
    memset(record, 0, sizeof *record);
    memcpy(record->magic, magic, sizeof magic);
    record->sequence = sequence;
    record->slots = slots;
    /* An empty slot has no time in it: a formatted ring is reproducible. */
    if (sequence) {
        record->realtime = clock_ns(CLOCK_REALTIME);
        record->boottime = clock_ns(CLOCK_BOOTTIME);
        snprintf(record->boot_id, sizeof record->boot_id, "%s", boot_id);
    }
    memset(record->filler, 'a' + sequence % 26, sizeof record->filler);
    record->checksum = checksum(record);
}

struct scan {
    uint64_t slots;      /* of the ring, as the records say; 0: no record */
    uint64_t empty;
    uint64_t corrupt;
    uint64_t duplicates;
    uint64_t outdated;   /* older than a whole round: a lost overwrite */
    uint64_t valid;
    uint64_t lowest;     /* of what should be there: the last round */
    uint64_t highest;
    uint64_t contiguous; /* all from lowest to this one are there */
    uint64_t missing;
    int ranges;
    uint64_t range[MAX_RANGES][2]; /* the first missing ranges */
};

static int by_value(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

    return (left > right) - (left < right);
}

static void missing(struct scan *scan, uint64_t first, uint64_t last)
{
    if (first > last)
        return;
    scan->missing += last - first + 1;
    if (scan->ranges < MAX_RANGES) {
        scan->range[scan->ranges][0] = first;
        scan->range[scan->ranges++][1] = last;
    }
}

static void judge(struct scan *scan, uint64_t *found)
{
    uint64_t next, i = 0;

    qsort(found, scan->valid, sizeof *found, by_value);
    scan->highest = scan->valid ? found[scan->valid - 1] : 0;
    scan->lowest = scan->highest > scan->slots ? scan->highest - scan->slots + 1 : !!scan->highest;
    for (; i < scan->valid && found[i] < scan->lowest; i++)
        scan->outdated++;
    for (next = scan->lowest; i < scan->valid; i++) {
        if (found[i] < next) {
            scan->duplicates++;
            continue;
        }
        missing(scan, next, found[i] - 1);
        next = found[i] + 1;
    }
    scan->contiguous = scan->ranges ? scan->range[0][0] - 1 : scan->highest;
}

/* Looks at every sector of an open file. Sectors without the magic number are
 * not the ring's, or are missed in it. */
static void scan_file(int file, const char *path, struct scan *scan)
{
    uint64_t *found = NULL, room = 0;
    off_t offset = 0;
    ssize_t length;
    char *chunk;

    memset(scan, 0, sizeof *scan);
    if (posix_memalign((void **)&chunk, 4096, CHUNK))
        die("out of memory");
    while ((length = pread(file, chunk, CHUNK, offset)) > 0) {
        for (ssize_t at = 0; at < length; at += RECORD) {
            struct record record;

            if (length - at < RECORD) {
                scan->corrupt++; /* a truncated record */
                break;
            }
            memcpy(&record, chunk + at, RECORD);
            if (memcmp(record.magic, magic, sizeof magic))
                continue;
            if (record.checksum != checksum(&record)) {
                scan->corrupt++;
                continue;
            }
            scan->slots = record.slots;
            if (!record.sequence) {
                scan->empty++;
                continue;
            }
            if (scan->valid == room) {
                room = room ? room * 2 : 4096;
                found = realloc(found, room * sizeof *found);
                if (!found)
                    die("out of memory");
            }
            found[scan->valid++] = record.sequence;
        }
        offset += length;
    }
    if (length < 0)
        die("cannot read %s: %s", path, strerror(errno));
    judge(scan, found);
    free(found);
    free(chunk);
}

static int open_ring(const char *path, int flags, int *direct)
{
    int file = open(path, flags | O_DIRECT | O_CLOEXEC);

    *direct = file >= 0;
    if (file < 0 && errno == EINVAL) /* tmpfs cannot */
        file = open(path, flags | O_CLOEXEC);
    if (file < 0)
        die("cannot open %s: %s", path, strerror(errno));
    return file;
}

static int format(const char *path, uint64_t slots)
{
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    struct record record;

    if (file < 0)
        die("cannot create %s: %s", path, strerror(errno));
    make(&record, 0, slots, "");
    for (uint64_t i = 0; i < slots; i++)
        if (write(file, &record, RECORD) != RECORD)
            die("cannot write %s: %s", path, strerror(errno));
    if (fsync(file) || close(file))
        die("cannot write %s: %s", path, strerror(errno));
    return 0;
}

static int check(const char *path, uint64_t acknowledged)
{
    int file = open(path, O_RDONLY | O_CLOEXEC), sound;
    struct scan scan;

    if (file < 0)
        die("cannot open %s: %s", path, strerror(errno));
    scan_file(file, path, &scan);
    close(file);
    sound = scan.slots && !scan.corrupt && !scan.duplicates && !scan.outdated && !scan.missing &&
            scan.contiguous >= acknowledged;
    printf("{\"sound\":%s,\"slots\":%llu,\"valid\":%llu,\"empty\":%llu,\"corrupt\":%llu,"
           "\"duplicates\":%llu,\"outdated\":%llu,\"lowest\":%llu,\"highest\":%llu,"
           "\"contiguous\":%llu,\"acknowledged\":%llu,\"missing\":%llu,\"gaps\":[",
           sound ? "true" : "false", (unsigned long long)scan.slots, (unsigned long long)scan.valid,
           (unsigned long long)scan.empty, (unsigned long long)scan.corrupt,
           (unsigned long long)scan.duplicates, (unsigned long long)scan.outdated,
           (unsigned long long)scan.lowest, (unsigned long long)scan.highest,
           (unsigned long long)scan.contiguous, (unsigned long long)acknowledged,
           (unsigned long long)scan.missing);
    for (int i = 0; i < scan.ranges; i++)
        printf("%s[%llu,%llu]", i ? "," : "", (unsigned long long)scan.range[i][0],
               (unsigned long long)scan.range[i][1]);
    printf("]}\n");
    return !sound;
}

/* While a file says 1: makes no record, and leaves the disk alone. */
static void pause_if_wanted(int ring, const char *file, const char *status)
{
    char text[64];
    int paused = 0;

    while (file && read_text(file, text, sizeof text) > 0 && !strcmp(text, "1")) {
        if (!paused) {
            /* What the file system has yet to write of earlier records. */
            syncfs(ring);
            publish(status, "{\"paused\":true}\n");
            paused = 1;
        }
        sleep_until(clock_ns(CLOCK_MONOTONIC) + 200 * NS_PER_MS);
    }
}

static int run(const char *path, uint64_t interval_ms, const char *pause_file, const char *status)
{
    uint64_t recovered, sequence, written = 0, write_errors = 0, readback_errors = 0, foreign = 0;
    int64_t wake = clock_ns(CLOCK_MONOTONIC), slowest = 0;
    struct record *last, *on_disk;
    char boot_id[40] = "";
    struct scan scan;
    int file, direct;

    file = open_ring(path, O_RDWR | O_DSYNC, &direct);
    scan_file(file, path, &scan);
    if (!scan.slots)
        die("%s: no ring in it (diskseq format makes one)", path);
    if (posix_memalign((void **)&last, 4096, RECORD) ||
        posix_memalign((void **)&on_disk, 4096, 2 * RECORD))
        die("out of memory");
    read_text("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
    recovered = sequence = scan.highest;
    for (;; wake += interval_ms * NS_PER_MS) {
        ssize_t got;
        int64_t begun, now;

        pause_if_wanted(file, pause_file, status);
        got = pread(file, on_disk, 2 * RECORD, sequence % scan.slots * RECORD);

        /* What was acknowledged must be there as written: else the disk went
         * back in time, or somebody else writes. Of the latter, the one who
         * is behind sees records of the future. (There is no next record to
         * read at the end of the ring: the following round will tell.) */
        if (written && (got < RECORD || memcmp(on_disk, last, RECORD))) {
            readback_errors++;
            fprintf(stderr, "diskseq: record %llu is not what was written\n",
                    (unsigned long long)sequence);
        }
        if (got == 2 * RECORD && on_disk[1].checksum == checksum(&on_disk[1]) &&
            on_disk[1].sequence > sequence) {
            foreign++;
            fprintf(stderr, "diskseq: record %llu was written by somebody else\n",
                    (unsigned long long)on_disk[1].sequence);
        }
        make(last, sequence + 1, scan.slots, boot_id);
        begun = clock_ns(CLOCK_MONOTONIC);
        if (pwrite(file, last, RECORD, (sequence + 1) % scan.slots * RECORD) == RECORD) {
            sequence++;
            written++;
        } else {
            fprintf(stderr, "diskseq: cannot write record %llu: %s\n",
                    (unsigned long long)sequence + 1, strerror(errno));
            write_errors++;
            written = 0; /* nothing in memory to compare the disk with */
        }
        now = clock_ns(CLOCK_MONOTONIC);
        if (now - begun > slowest)
            slowest = now - begun;
        publish(status,
                "{\"sequence\":%llu,\"recovered\":%llu,\"missing_at_start\":%llu,"
                "\"corrupt_at_start\":%llu,\"slots\":%llu,\"interval_ms\":%llu,\"direct\":%s,"
                "\"write_errors\":%llu,\"readback_errors\":%llu,\"foreign_records\":%llu,"
                "\"last_write_ms\":%.1f,\"slowest_write_ms\":%.1f,\"paused\":false,\"updated\":%.3f}\n",
                (unsigned long long)sequence, (unsigned long long)recovered,
                (unsigned long long)scan.missing, (unsigned long long)scan.corrupt,
                (unsigned long long)scan.slots, (unsigned long long)interval_ms,
                direct ? "true" : "false", (unsigned long long)write_errors,
                (unsigned long long)readback_errors, (unsigned long long)foreign,
                (now - begun) / (double)NS_PER_MS, slowest / (double)NS_PER_MS, uptime());
        if (now - wake > (int64_t)interval_ms * NS_PER_MS)
            wake = now;
        sleep_until(wake + interval_ms * NS_PER_MS);
    }
}

int diskseq_main(int argc, char **argv)
{
    static const struct option options[] = {
        {"slots", required_argument, NULL, 'n'},
        {"interval-ms", required_argument, NULL, 'i'},
        {"pause-file", required_argument, NULL, 'p'},
        {"status", required_argument, NULL, 's'},
        {"acknowledged", required_argument, NULL, 'a'},
        {0},
    };
    uint64_t slots = 16384, interval_ms = 1000, acknowledged = 0;
    const char *pause_file = NULL, *status = NULL;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        switch (option) {
        case 'n': slots = number("--slots", optarg, 2, MAX_SLOTS); break;
        case 'i': interval_ms = number("--interval-ms", optarg, 1, 3600000); break;
        case 'p': pause_file = optarg; break;
        case 's': status = optarg; break;
        case 'a': acknowledged = number("--acknowledged", optarg, 0, UINT64_MAX); break;
        default: return 2;
        }
    if (optind + 2 == argc) {
        const char *verb = argv[optind], *path = argv[optind + 1];

        if (strcmp(verb, "format") == 0)
            return format(path, slots);
        if (strcmp(verb, "check") == 0)
            return check(path, acknowledged);
        if (strcmp(verb, "run") == 0 && status)
            return run(path, interval_ms, pause_file, status);
    }
    die("usage: diskseq format RING [--slots N]\n"
        "       diskseq run RING --status FILE [--interval-ms MS] [--pause-file FILE]\n"
        "       diskseq check RING_OR_DISK [--acknowledged SEQUENCE]");
}
