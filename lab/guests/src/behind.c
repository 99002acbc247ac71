/* Leaves data behind for the kernel to write, as programs do that do not wait
 * for their disk, and sees afterwards what came of it.
 *
 * A process that waits for its disk keeps a guest from being suspended; one
 * that has left its data behind does not. So only with the latter a guest is
 * suspended while its requests are still under way.
 *
 * The data lies at the end of the disk, outside the file system, so that no
 * journal has a part in it. Commands come in a control file: "write" leaves
 * other data there than before, "check" reads it from the disk. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGE 4096
#define POLL_MS 200

/* Fills a buffer with what no other generation holds anywhere. */
static void fill(uint64_t *words, size_t size, uint64_t generation)
{
    for (size_t i = 0; i < size / sizeof *words; i++)
        words[i] = (generation * 0x100003 + i) * UINT64_C(0x9e3779b97f4a7c15);
}

/* Pages of the disk that do not hold what was left for them. */
static uint64_t wrong(int disk, const char *expected, size_t size, off_t offset)
{
    uint64_t found = 0;
    char *page;

    if (posix_memalign((void **)&page, PAGE, PAGE))
        die("out of memory");
    for (size_t at = 0; at < size; at += PAGE)
        if (pread(disk, page, PAGE, offset + at) != PAGE || memcmp(page, expected + at, PAGE))
            found++;
    free(page);
    return found;
}

static void run(const char *path, uint64_t mib, const char *control, const char *status)
{
    size_t size = mib << 20;
    int cached = open(path, O_RDWR | O_CLOEXEC), direct = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    char done[64] = "", word[64];
    uint64_t generation = clock_ns(CLOCK_REALTIME); /* no one twice, after a reboot neither */
    char *buffer;
    off_t offset;

    if (cached < 0 || direct < 0)
        die("cannot open %s: %s", path, strerror(errno));
    offset = lseek(cached, 0, SEEK_END) - (off_t)size;
    if (offset < 0 || offset % PAGE)
        die("%s: its last %llu MiB do not begin at a page", path, (unsigned long long)mib);
    if (posix_memalign((void **)&buffer, PAGE, size))
        die("out of memory");
    fill((uint64_t *)buffer, size, generation);
    publish(status, "{\"done\":\"\",\"pages\":%zu,\"wrong\":null}\n", size / PAGE);
    for (;; sleep_until(clock_ns(CLOCK_MONOTONIC) + POLL_MS * NS_PER_MS)) {
        if (read_text(control, word, sizeof word) <= 0 || !strcmp(word, done))
            continue;
        if (!strcmp(word, "write")) {
            fill((uint64_t *)buffer, size, ++generation);
            /* The latter begins to write, and does not wait for the end. */
            if (pwrite(cached, buffer, size, offset) != (ssize_t)size ||
                sync_file_range(cached, offset, size, SYNC_FILE_RANGE_WRITE))
                die("cannot write to %s: %s", path, strerror(errno));
            publish(status, "{\"done\":\"write\",\"pages\":%zu,\"wrong\":null}\n", size / PAGE);
        } else if (!strcmp(word, "check")) {
            publish(status, "{\"done\":\"check\",\"pages\":%zu,\"wrong\":%llu}\n", size / PAGE,
                    (unsigned long long)wrong(direct, buffer, size, offset));
        } else {
            continue;
        }
        strcpy(done, word);
    }
}

int behind_main(int argc, char **argv)
{
    static const struct option options[] = {
        {"mib", required_argument, NULL, 'm'},
        {"control", required_argument, NULL, 'c'},
        {"status", required_argument, NULL, 's'},
        {0},
    };
    const char *control = NULL, *status = NULL;
    uint64_t mib = 0;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        switch (option) {
        case 'm': mib = number("--mib", optarg, 1, 64); break;
        case 'c': control = optarg; break;
        case 's': status = optarg; break;
        default: return 2;
        }
    if (!mib || !control || !status || optind + 1 != argc)
        die("usage: behind DISK --mib MIB --control FILE --status FILE");
    run(argv[optind], mib, control, status);
    return 2;
}
