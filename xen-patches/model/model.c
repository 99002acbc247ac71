/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Random sessions of zero-copy exchange, from OFFER to the end, with memory
 * running out, frames in use by others, log-dirty mode coming and going, and
 * blocks that one side has, or wants, in 4KiB.  Whatever happens, and however
 * it ends, nothing of either domain must get lost, duplicated, or leak.
 */

#include "xen.h"
#include "sessions.c"

static struct domain src = { .domain_id = 1 }, dst = { .domain_id = 2 };
static struct zc_session session;
/* Another one of the same two, in which nothing happens. */
static struct zc_session other;

/* By block: extents of 2MiB, as offered, and as to be accepted. */
static bool large[NR_BLOCKS], wanted[NR_BLOCKS];
static bool all_large;
/* The destination's block, for the source's. */
static unsigned int counterpart[NR_BLOCKS];
/* What the guest has in its memory. */
static uint64_t guest[NR_GFNS];

static unsigned int committed, aborted, reverted, copied;

static bool maybe(unsigned int percent)
{
    return chance(percent * 10);
}

static void memory_short(void)
{
    records_fail = maybe(30) ? 5 : 0;
    tables_fail = maybe(30) ? 300 : 0;
}

static void memory_plenty(void)
{
    records_fail = tables_fail = 0;
}

static void create_domain(struct domain *d, unsigned long first_mfn)
{
    unsigned int i;

    d->log_dirty = false;
    d->tot_pages = NR_GFNS;
    d->p2m = (struct p2m_domain){ .domain = d, .get_entry = get_entry };

    for ( i = 0; i < NR_BLOCKS; i++ )
        d->p2m.superpage[i] = maybe(80);

    for ( i = 0; i < NR_GFNS; i++ )
    {
        d->p2m.mfn[i] = first_mfn + i;
        d->p2m.type[i] = p2m_ram_rw;
        frames[first_mfn + i] = (struct page_info){
            .count_info = PGC_allocated | 1,
            .owner = d,
            .gfn = i,
            .contents = ((uint64_t)d->domain_id << 32) | i,
        };
    }
}

/* Device models and backends come and go. */
static void use_frames(unsigned int of_10000)
{
    struct page_info *pg;

    for ( pg = frames; pg < frames + NR_FRAMES; pg++ )
        if ( pg->in_use && maybe(50) )
        {
            pg->in_use = false;
            put_page(pg);
        }
        else if ( !pg->in_use && (unsigned int)rand() % 10000 < of_10000 )
            pg->in_use = get_page(pg, pg->owner);
}

static void unuse_frames(void)
{
    struct page_info *pg;

    for ( pg = frames; pg < frames + NR_FRAMES; pg++ )
        if ( pg->in_use )
        {
            pg->in_use = false;
            put_page(pg);
        }
}

static void toggle_log_dirty(struct domain *d)
{
    p2m_type_t from = d->log_dirty ? p2m_ram_logdirty : p2m_ram_rw;
    unsigned int i;

    d->log_dirty = !d->log_dirty;
    for ( i = 0; i < NR_GFNS; i++ )
        if ( d->p2m.type[i] == from )
            d->p2m.type[i] = d->log_dirty ? p2m_ram_logdirty : p2m_ram_rw;
}

static unsigned int list_extents(struct xen_zerocopy_extent *x,
                                 const bool *whole, bool accept,
                                 bool interleaved)
{
    unsigned int b, i, n = 0;

    for ( b = 0; b < NR_BLOCKS; b++ )
        if ( whole[b] )
            x[n++] = (struct xen_zerocopy_extent){
                .tag = b * 512,
                .gfn = (accept ? counterpart[b] : b) * 512,
                .order = PAGE_ORDER_2M,
                .status = XEN_ZEROCOPY_EXT_UNSEEN,
            };

    for ( i = 0; i < NR_GFNS; i++ )
    {
        unsigned int page = interleaved ? i / NR_BLOCKS : i % 512;

        b = interleaved ? i % NR_BLOCKS : i / 512;
        if ( !whole[b] )
            x[n++] = (struct xen_zerocopy_extent){
                .tag = b * 512 + page,
                .gfn = (accept ? counterpart[b] : b) * 512 + page,
                .order = PAGE_ORDER_4K,
                .status = XEN_ZEROCOPY_EXT_UNSEEN,
            };
    }

    return n;
}

static void call_extents(unsigned int call, unsigned int flags,
                         struct xen_zerocopy_extent *x, unsigned int n)
{
    struct xen_zerocopy_op op = {
        .op = call, .flags = flags, .nr_extents = n,
    };
    unsigned int start = 0;
    int rc;

    caller_extents = x;
    do
        rc = zc_extents(&session, &op, &start);
    while ( rc == -ERESTART );

    assert(!rc && start == n);
}

static void offer(void)
{
    static struct xen_zerocopy_extent x[NR_GFNS];
    unsigned int i, n, try = 0;
    bool again;

    for ( i = 0; i < NR_BLOCKS; i++ )
        large[i] = all_large || maybe(80);

    do {
        if ( ++try > 50 )
            memory_plenty();

        n = list_extents(x, large, false, maybe(50));
        call_extents(XEN_ZEROCOPY_OP_OFFER, 0, x, n);

        for ( again = false, i = 0; i < n; i++ )
            if ( x[i].status )
            {
                assert(x[i].status == -ENOMEM && try <= 50);
                again = true;
            }
    } while ( again );

    assert(session.offered == NR_GFNS);
}

static void accept(unsigned int in_use)
{
    static struct xen_zerocopy_extent x[NR_GFNS];
    unsigned int i, n, try = 0;
    bool again;

    for ( i = 0; i < NR_BLOCKS; i++ )
        wanted[i] = large[i] && (all_large || maybe(60));

    do {
        if ( ++try > 50 )
            memory_plenty();

        use_frames(in_use);
        n = list_extents(x, wanted, true, maybe(50));
        call_extents(XEN_ZEROCOPY_OP_ACCEPT,
                     try > 5 ? XEN_ZEROCOPY_F_COPY : 0, x, n);

        for ( again = false, i = 0; i < n; i++ )
            if ( x[i].status )
            {
                assert(x[i].status == -EBUSY || x[i].status == -EXDEV ||
                       x[i].status == -ENOMEM);
                assert(try < 1000);
                /* As libxenguest does. */
                if ( x[i].status == -EXDEV ||
                     (x[i].status == -EBUSY && try > 3) )
                    wanted[x[i].tag / 512] = false;
                again = true;
            }
    } while ( again );

    assert(session.shared + session.copies == NR_GFNS);
}

/* Whether it comes to an end, or is given up. */
static bool commit(unsigned int in_use)
{
    unsigned int patience = rand() % 6, try = 0;

    for ( ; ; )
    {
        /* Either may go on once the source has begun. */
        int rc = session.commit && maybe(30)
                 ? zc_force_commit(&session, try > patience)
                 : zc_commit(&session, try > patience);

        if ( !rc )
            return true;

        assert(rc == -EBUSY || rc == -ERESTART);
        use_frames(in_use);
        try += rc == -EBUSY;
        if ( maybe(1) )
            return false;
    }
}

static void check(bool handed_over)
{
    unsigned int b, i;

    for ( i = 0; i < NR_FRAMES; i++ )
        assert(frames[i].count_info == (PGC_allocated | 1));

    for ( b = 0; b < NR_BLOCKS; b++ )
        for ( i = 0; i < 512; i++ )
        {
            unsigned int sgfn = b * 512 + i, dgfn = counterpart[b] * 512 + i;
            struct page_info *s = &frames[src.p2m.mfn[sgfn]];
            struct page_info *d = &frames[dst.p2m.mfn[dgfn]];

            assert(s->owner == &src && s->gfn == sgfn);
            assert(d->owner == &dst && d->gfn == dgfn);
            assert(src.p2m.type[sgfn] != p2m_ram_borrowed);
            assert(dst.p2m.type[dgfn] != p2m_ram_borrowed);

            if ( handed_over )
            {
                assert(d->contents == guest[sgfn]);
                /* Nothing of the destination's. */
                assert(!s->contents || s->contents == guest[sgfn]);
            }
            else
                assert(s->contents == guest[sgfn]);
        }
}

static void new_session(struct zc_session *s, unsigned int id)
{
    *s = (struct zc_session){
        .id = id,
        .state = XEN_ZEROCOPY_STATE_OPEN,
        .max_frames = NR_GFNS,
        .d = { &src, &dst },
    };
    s->list = (struct list_head){ &zc_sessions, zc_sessions.prev };
    zc_sessions.prev->next = &s->list;
    zc_sessions.prev = &s->list;
}

/* What has been offered elsewhere counts, for as long as there's a record. */
static void exceed(void)
{
    static struct xen_zerocopy_extent x[NR_BLOCKS];
    unsigned int i, n, taken = 0;

    memset(large, true, sizeof(large));
    n = list_extents(x, large, false, false);
    assert(n == NR_BLOCKS);

    other.offered = 3 * 512 - 1;
    call_extents(XEN_ZEROCOPY_OP_OFFER, 0, x, n);
    for ( i = 0; i < n; i++ )
    {
        assert(!x[i].status || x[i].status == -ENOSPC);
        taken += !x[i].status;
        x[i].status = XEN_ZEROCOPY_EXT_UNSEEN;
    }
    assert(taken == NR_BLOCKS - 3 && session.offered == taken * 512);

    other.closed[ZC_DST] = true;
    call_extents(XEN_ZEROCOPY_OP_OFFER, 0, x, n);
    for ( i = 0; i < n; i++ )
        assert(!x[i].status);

    while ( zc_abort(&session, ZC_SRC) == -ERESTART );
}

static void play(unsigned int seed)
{
    unsigned int i, in_use;
    bool handed_over;

    srand(seed);

    /* p2ms are locked in the order of domain ids. */
    if ( maybe(50) )
        SWAP(src.domain_id, dst.domain_id);
    create_domain(&src, 0);
    create_domain(&dst, NR_GFNS);
    for ( i = 0; i < NR_GFNS; i++ )
        guest[i] = frames[src.p2m.mfn[i]].contents;
    for ( i = 0; i < NR_BLOCKS; i++ )
        counterpart[i] = (i * 3 + seed) % NR_BLOCKS;

    zc_sessions = (struct list_head){ &zc_sessions, &zc_sessions };
    new_session(&session, 1);
    new_session(&other, 2);

    all_large = maybe(30);
    in_use = maybe(50) ? rand() % 20 : 0;
    use_frames(in_use);

    memory_short();
    offer();
    if ( maybe(25) )
        toggle_log_dirty(&src);

    memory_short();
    if ( maybe(90) )
        accept(in_use);
    if ( maybe(25) )
        toggle_log_dirty(&dst);

    /* The host's control domain may not begin in place of the source. */
    assert(zc_force_commit(&session, true) == -EILSEQ);
    assert(session.state == XEN_ZEROCOPY_STATE_OPEN && !session.commit);

    memory_short();
    if ( maybe(20) )
        /* Some of each block. */
        use_frames(in_use = 200);
    handed_over = session.shared && maybe(80) && commit(in_use);

    if ( !handed_over )
    {
        while ( zc_abort(&session, ZC_SRC) == -ERESTART );
        aborted++;
    }
    else if ( maybe(30) )
    {
        handed_over = false;
        if ( maybe(50) )
            /* Some of each block. */
            use_frames(200);
        while ( zc_revert(&session) == -ERESTART );
        reverted++;
    }
    else
        committed++;

    assert(!session.lost);
    copied += session.copied;

    unuse_frames();
    check(handed_over);

    while ( zc_forget_batch(&session) );
    assert(!records);
}

int main(int argc, char *argv[])
{
    unsigned int i, rounds = argc > 1 ? atoi(argv[1]) : 0;

    create_domain(&src, 0);
    create_domain(&dst, NR_GFNS);
    new_session(&session, 1);
    new_session(&other, 2);
    exceed();

    for ( i = 1; i <= rounds; i++ )
        play(i);

    printf("%u sessions: %u committed, %u aborted, %u reverted; %u frames"
           " copied; at most %u allocations and accesses in one go, %u of them"
           " accesses; %u flushes of all TLBs\n",
           rounds, committed, aborted, reverted, copied, max_work, max_touched,
           flushes);

    return !committed || !aborted || !reverted || !copied;
}
