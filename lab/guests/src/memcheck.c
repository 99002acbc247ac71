/* Keeps rewriting checksummed memory and checks every page before it is
 * rewritten.
 *
 * A migration that forgets a page delivers an old copy of it, whose own
 * checksum is right. So the checksum is not enough: pages are rewritten in a
 * fixed order, round after round, and therefore the generation that each page
 * must have is known from the round alone, without a table that might be just
 * as old as the page. */
#include "guest.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096
#define MAX_RATE 1000000
#define BATCHES_PER_S 4 /* each a wake-up, dear in a nested guest */

struct page {
    uint64_t generation;
    uint64_t index;
    uint64_t checksum;
    uint64_t words[PAGE / 8 - 3];
};

enum fault { NONE, CORRUPT, MISPLACED, STALE, AHEAD, FAULTS };

static const char *const fault_names[FAULTS] = {"none", "corrupt", "misplaced", "stale", "ahead"};

struct state {
    struct page *pages;
    uint64_t count;
    uint64_t stride;      /* distance between two pages rewritten in a row */
    uint64_t round;       /* the generation being written */
    uint64_t position;    /* pages of this round already rewritten */
    uint64_t next;        /* index of the page to rewrite next */
    uint64_t rewritten;
    uint64_t faults[FAULTS];
    char last_error[160]; /* JSON */
};

static uint64_t checksum(const struct page *page)
{
    return checksum_words(page->index << 32 ^ page->generation, page->words,
                          sizeof page->words / 8);
}

static void rewrite(struct page *page, uint64_t index, uint64_t generation)
{
    uint64_t word = (index << 32 ^ generation) * 0xd1342543de82ef95;

    for (size_t i = 0; i < sizeof page->words / 8; i++, word += 0x9e3779b97f4a7c15)
        page->words[i] = word;
    page->generation = generation;
    page->index = index;
    page->checksum = checksum(page);
}

static enum fault check(const struct page *page, uint64_t index, uint64_t generation)
{
    if (page->checksum != checksum(page))
        return CORRUPT;
    if (page->index != index)
        return MISPLACED;
    if (page->generation < generation)
        return STALE;
    return page->generation > generation ? AHEAD : NONE;
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
    return b ? common_divisor(b, a % b) : a;
}

static void fill(struct state *state, uint64_t mib, int lock)
{
    state->count = mib << 20 >> 12;
    state->pages = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (state->pages == MAP_FAILED)
        die("cannot have %llu MiB: %s", (unsigned long long)mib, strerror(errno));
    if (lock && mlock(state->pages, mib << 20))
        die("cannot lock %llu MiB: %s (--no-lock goes without)", (unsigned long long)mib,
            strerror(errno));
    for (uint64_t i = 0; i < state->count; i++)
        rewrite(&state->pages[i], i, 1);
    state->round = 2;
    /* Neighbours in time are not neighbours in memory, yet every page has its
     * turn in every round. */
    state->stride = state->count * 618 / 1000 + 1;
    while (common_divisor(state->stride, state->count) != 1)
        state->stride++;
    strcpy(state->last_error, "null");
}

static void step(struct state *state)
{
    struct page *page = &state->pages[state->next];
    enum fault fault = check(page, state->next, state->round - 1);

    if (fault != NONE) {
        state->faults[fault]++;
        snprintf(state->last_error, sizeof state->last_error,
                 "{\"kind\":\"%s\",\"page\":%llu,\"expected\":%llu,\"found\":%llu,\"uptime\":%.3f}",
                 fault_names[fault], (unsigned long long)state->next,
                 (unsigned long long)state->round - 1, (unsigned long long)page->generation,
                 uptime());
        fprintf(stderr, "memcheck: %s\n", state->last_error);
    }
    rewrite(page, state->next, state->round);
    state->rewritten++;
    state->next = (state->next + state->stride) % state->count;
    if (++state->position == state->count) {
        state->position = 0;
        state->round++;
    }
}

static void report(const struct state *state, const char *path, uint64_t rate, double achieved)
{
    const uint64_t *f = state->faults;

    publish(path,
            "{\"mib\":%llu,\"pages\":%llu,\"rate\":%llu,\"achieved_rate\":%.0f,"
            "\"round\":%llu,\"verified\":%llu,\"errors\":%llu,\"corrupt\":%llu,"
            "\"misplaced\":%llu,\"stale\":%llu,\"ahead\":%llu,\"last_error\":%s,"
            "\"updated\":%.3f}\n",
            (unsigned long long)state->count >> 8, (unsigned long long)state->count,
            (unsigned long long)rate, achieved, (unsigned long long)state->round,
            (unsigned long long)state->rewritten,
            (unsigned long long)(f[CORRUPT] + f[MISPLACED] + f[STALE] + f[AHEAD]),
            (unsigned long long)f[CORRUPT], (unsigned long long)f[MISPLACED],
            (unsigned long long)f[STALE], (unsigned long long)f[AHEAD], state->last_error,
            uptime());
}

/* The rate in the control file, or the present one when there is no file or
 * no sense in it. */
static uint64_t wanted_rate(const char *path, uint64_t present)
{
    char text[64], *end;
    unsigned long long rate;

    if (!path || read_text(path, text, sizeof text) <= 0)
        return present;
    rate = strtoull(text, &end, 10);
    return *end || text[0] == '-' || rate > MAX_RATE ? present : rate;
}

int memcheck_main(int argc, char **argv)
{
    static const struct option options[] = {
        {"mib", required_argument, NULL, 'm'},
        {"rate", required_argument, NULL, 'r'},
        {"rate-file", required_argument, NULL, 'f'},
        {"status", required_argument, NULL, 's'},
        {"status-ms", required_argument, NULL, 'i'},
        {"no-lock", no_argument, NULL, 'n'},
        {0},
    };
    const char *status = NULL, *rate_file = NULL;
    uint64_t mib = 0, rate = 0, status_ms = 1000, reported_count = 0;
    struct state state = {0};
    int64_t wake, reported;
    double credit = 0;
    int option, lock = 1;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        switch (option) {
        case 'm': mib = number("--mib", optarg, 1, 1 << 20); break;
        case 'r': rate = number("--rate", optarg, 0, MAX_RATE); break;
        case 'f': rate_file = optarg; break;
        case 's': status = optarg; break;
        case 'i': status_ms = number("--status-ms", optarg, 1, 60000); break;
        case 'n': lock = 0; break;
        default: return 2;
        }
    if (!mib || !status || optind != argc)
        die("usage: memcheck --mib MIB --status FILE [--status-ms MS] [--rate PAGES_PER_S]\n"
            "                [--rate-file FILE] [--no-lock]");

    fill(&state, mib, lock);
    report(&state, status, rate, 0);
    wake = reported = clock_ns(CLOCK_MONOTONIC);
    for (;;) {
        int64_t now;

        wake += rate ? NS_PER_S / BATCHES_PER_S : (int64_t)status_ms * NS_PER_MS;
        sleep_until(wake);
        now = clock_ns(CLOCK_MONOTONIC);
        /* What a pause or a slow CPU left undone is not made up for: a burst
         * after each pause would be a load that nobody asked for. */
        if (now - wake > NS_PER_S / BATCHES_PER_S)
            wake = now;
        for (credit += (double)rate / BATCHES_PER_S; credit >= 1; credit--)
            step(&state);
        now = clock_ns(CLOCK_MONOTONIC);
        if (now - reported >= (int64_t)status_ms * NS_PER_MS) {
            report(&state, status, rate,
                   (state.rewritten - reported_count) * (double)NS_PER_S / (now - reported));
            reported = now;
            reported_count = state.rewritten;
            rate = wanted_rate(rate_file, rate);
        }
    }
}
