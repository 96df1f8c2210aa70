// Stress for moe::reads: one driver makes random calls, the lanes read, an observer looks on.
//
//   stress [STEPS [SEED [FOLDER]]]      the folder takes two files of a few megabytes for a while
//
// A model of every slot runs along. What a pass proves, for 1, 2 and 4 lanes, buffered and (where
// FOLDER allows it) direct, with and without a finish:
//  1. A READY slot holds exactly the bytes of the key last submitted to it, finished once.
//  2. A slot that someone waits for ends READY or FAILED; FAILED only by an injected error, once each.
//  3. A key that was given up is reported once, unless its slot was taken for another one before.
//  4. No slot is lost: after draining each is EMPTY, READY or FAILED, as the model says, and in use again.
//  5. One lane at most reads guesses; with one lane a demand waits behind one of their chunks at most.
//  6. The counters add up.
// Built with -fsanitize=thread it also proves that no schedule among these has a data race.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "reads.h"

namespace {

using moe::slot_state;

constexpr int     N_SLOTS = 10, N_KEYS = 40, MAX_CHUNKS = 4;
constexpr int     STUCK_S = 20, EVENTS = 1 << 14;
constexpr int64_t PAGE       = 4096;
constexpr int64_t BIG_BYTES  = 2 * moe::CHUNK_BYTES + 1234;  // of key 0, in several chunks; the others are tiny
constexpr int64_t SLOT_BYTES = (BIG_BYTES / PAGE + 6) * PAGE;

int64_t  step = 0;
unsigned seed = 1;

[[noreturn]] void fail(const char * what) {
    fprintf(stderr, "stress: %s (step %lld, seed %u)\n", what, (long long)step, seed);
    _exit(1);
}

void check(bool ok, const char * what) {
    if (!ok) {
        fail(what);
    }
}

struct random_source {
    std::mt19937 engine;
    int          below(int n) { return (int)(engine() % (unsigned)n); }
    bool         chance(int percent) { return below(100) < percent; }
};

// Two files of random bytes and where the parts of every key lie in them and in a slot.
struct blobs {
    struct piece {
        int     file;
        int64_t offset, bytes, slot_offset;
    };
    std::vector<std::string>        paths;
    std::vector<std::vector<char>>  contents;
    std::vector<std::vector<piece>> keys;

    blobs(const std::string & folder, random_source & random) : contents(2), keys(N_KEYS) {
        for (int key = 0; key < N_KEYS; key++) {
            int64_t at = PAGE;
            for (int i = key == 0 ? 0 : random.below(3); i >= 0; i--) {
                const int     file   = random.below(2);
                auto &        bytes  = contents[file];
                const int64_t offset = (int64_t)bytes.size() + random.below(700);
                const int64_t n      = key == 0 ? BIG_BYTES : 1 + random.below(random.chance(50) ? 600 : 6000);
                if (random.chance(50)) {  // direct reads into the slot itself; the others bounce
                    at = (at + PAGE - 1) / PAGE * PAGE + offset % PAGE;
                }
                keys[key].push_back({file, offset, n, at});
                at += n + 2 * PAGE;  // room for what aligned reads spill over both neighbours
                bytes.resize(offset + n);
            }
            check(at <= SLOT_BYTES, "the program's slots are too small");
        }
        for (size_t f = 0; f < contents.size(); f++) {
            for (char & c : contents[f]) {
                c = (char)random.engine();
            }
            paths.push_back(folder + "/stress-" + std::to_string(getpid()) + "-" + std::to_string(f));
            FILE * file = fopen(paths[f].c_str(), "wb");
            check(file && fwrite(contents[f].data(), 1, contents[f].size(), file) == contents[f].size() && fclose(file) == 0,
                  "cannot write the files");
        }
    }
    ~blobs() {
        for (const auto & path : paths) {
            unlink(path.c_str());
        }
    }
    int64_t bytes_of(int key) const {
        int64_t n = 0;
        for (const piece & p : keys[key]) {
            n += p.bytes;
        }
        return n;
    }
};

class driver {
  public:
    driver(const blobs & files, char * arena, random_source & random, int lanes, const moe_probe * direct, bool finish)
        : files_(files), arena_(arena), random_(random), lanes_(lanes), direct_(direct != nullptr), finish_(finish) {
        moe::read_options options;
        options.lanes = lanes;
        if (direct) {
            options.direct       = true;
            options.offset_align = direct->offset_align;
            options.memory_align = direct->memory_align;
        }
        if (finish) {
            options.finish = [this](int slot, int key) {
                check(key >= 0 && key < N_KEYS, "finish is called for no key");
                for (const auto & p : files_.keys[key]) {
                    base(slot)[p.slot_offset] ^= 1;
                }
                if (++finished_ % 16 == 0) {
                    usleep(100);  // what the driver does meanwhile is the interesting case
                }
            };
        }
        reads_ = std::make_unique<moe::reads>(files.paths, options);
        reads_->resize(N_SLOTS);
        reads_->history.resize(EVENTS);
    }

    void run(int64_t steps) {
        std::atomic<bool> stop{false};
        std::thread       observer([&] { observe(stop); });
        for (int64_t i = 1; i <= steps; i++, step++) {
            if (i % 64 == 1) {
                alarm(STUCK_S);
            }
            one_step();
            look(random_.below(N_SLOTS));
            if (i % 64 == 0) {
                read_history();
            }
            if (i % 1000 == 0) {
                drain();
            }
        }
        stop = true;
        observer.join();
        // The lanes are left in the middle of things: ending must not need a drain.
    }

    int64_t loads = 0, failures = 0, reported = 0;

  private:
    struct slot_model {
        int  key     = -1;
        bool guess   = false;  // not demanded yet
        bool dropped = false;  // given up, and its report is awaited
        bool failed  = false;  // seen FAILED
        bool ready   = false;  // seen READY
        bool demand  = false;  // was never a guess
    };
    struct waiting {
        bool    on       = false;
        int64_t asked_ns = 0, queued_ns = 0;  // before and after the submit
        int     guesses = 0;                  // chunks of guesses that went before
    };

    char *           base(int slot) { return arena_ + slot * SLOT_BYTES; }
    moe::reads &     reads() { return *reads_; }
    slot_state       state(int slot) { return reads_->state(slot); }
    int64_t          cancelled() { return reads_->count.guess_cancelled; }
    static const int never = -1;

    int slot_of(int key) {
        for (int i = 0; i < N_SLOTS; i++) {
            if (slots_[i].key == key) {
                return i;
            }
        }
        return never;
    }

    void one_step() {
        const int slot = random_.below(N_SLOTS), what = random_.below(100);
        if (what < 45) {
            int key = random_.chance(1) ? 0 : random_.below(N_KEYS - 1) + 1;
            while (slot_of(key) != never) {
                key = random_.below(N_KEYS - 1) + 1;
            }
            submit(slot, key, what < 20);
        } else if (what < 60) {
            demand(slot);
        } else if (what < 70) {
            drop(random_.below(3) == 0 ? random_.below(3) : N_SLOTS, true);
        } else if (what < 73) {
            cancel();
        } else if (what < 90) {
            wait();
        } else if (what < 93) {
            abandon();
        } else if (what < 97) {
            ask_keys();
        } else {
            inject();
        }
    }

    void submit(int slot, int key, bool guess) {
        slot_model &           model  = slots_[slot];
        const slot_state       was    = state(slot);
        const int64_t          before = cancelled();
        std::vector<moe::part> parts;
        for (const auto & p : files_.keys[key]) {
            parts.push_back({p.file, p.offset, p.bytes, base(slot) + p.slot_offset});
        }
        const int64_t asked_ns = moe::now_ns();
        reads().submit(slot, key, parts, guess);
        const int64_t queued_ns = moe::now_ns();
        const bool    may       = was == slot_state::LOADING && model.guess && !model.dropped;
        check(cancelled() - before <= (may ? 1 : 0), "a load that was no guess counts as a cancelled one");
        if (model.key >= 0) {
            waiting_[model.key].on = false;
        }
        waiting_[key] = {!guess, asked_ns, queued_ns, 0};
        model         = {key, guess, false, false, false, !guess};
        submitted_ += files_.bytes_of(key);
        guesses_ += guess;
        loads++;
    }

    // What the executor does with an expert that the plan takes for resident.
    void demand(int slot) {
        slot_model & model = slots_[slot];
        if (model.key < 0) {
            return;
        }
        check(reads().key_of(slot) == model.key, "a slot has another key than it was given");
        const slot_state was    = state(slot);
        const int64_t    before = reads().count.guess_promoted;
        reads().promote(slot);
        const int64_t n  = reads().count.guess_promoted - before;
        const bool    up = model.guess && !model.dropped && was == slot_state::LOADING;
        check(n <= (up ? 1 : 0), "a promotion is counted that was none");
        check(n == 1 || !up || state(slot) != slot_state::LOADING, "a promotion is not counted");
        model.guess = false;
        if (!reads().coming(slot)) {
            check(model.dropped || state(slot) == slot_state::FAILED, "a guess is gone that nobody gave up");
            submit(slot, model.key, false);
        }
        check(reads().coming(slot) || state(slot) == slot_state::FAILED, "a demanded slot is not coming");
    }

    void drop(int limit, bool some_loading) {
        int           wrong  = 0;
        const int64_t before = cancelled();
        reported_.clear();
        reads().drop_guesses(
            [&](int key) {
                const int slot = slot_of(key);
                check(slot != never && some_loading, "drop_guesses asks about a key that is not loading");
                slot_model & model = slots_[slot];
                check(model.guess && !model.dropped, "drop_guesses asks about a demand, or twice");
                if (random_.chance(60)) {
                    return false;
                }
                wrong++;
                return model.dropped = true;
            },
            reported_, limit);
        check(cancelled() - before == wrong, "dropped guesses are not counted as cancelled");
        check((int)reported_.size() <= limit, "more keys are reported than there is room for");
        for (const int32_t key : reported_) {
            const int slot = key < 0 ? never : slot_of(key);
            check(slot != never && slots_[slot].dropped, "a key is reported that was not given up, or twice");
            check(state(slot) == slot_state::EMPTY, "a key is reported whose slot is not empty");
            slots_[slot] = {};
            reported++;
        }
    }

    void cancel() {
        const int64_t before = cancelled();
        const int     n      = reads().cancel_guesses();
        int           gone   = 0;
        for (int slot = 0; slot < N_SLOTS; slot++) {
            slot_model & model = slots_[slot];
            if (model.guess && !model.dropped && state(slot) == slot_state::EMPTY) {
                model = {};
                gone++;
            }
        }
        check(gone == n && cancelled() - before == n, "cancelled guesses are miscounted");
    }

    void wait() {
        std::vector<int> wanted;
        for (int i = random_.below(3); i >= 0; i--) {
            const int slot = random_.below(N_SLOTS);
            if (state(slot) == slot_state::LOADING) {
                wanted.push_back(slot);
            }
        }
        reads().wait_any(wanted);
        bool woken = wanted.empty();
        for (const int slot : wanted) {
            woken = woken || state(slot) != slot_state::LOADING;
            look(slot);
        }
        check(woken, "a wait ended while all was loading");
    }

    void abandon() {
        std::vector<int> wanted;
        int              guesses = 0;
        for (int i = random_.below(3); i >= 0; i--) {
            wanted.push_back(random_.below(N_SLOTS));
            guesses += slots_[wanted.back()].guess && !slots_[wanted.back()].dropped;
        }
        const int64_t before = cancelled();
        reads().abandon(wanted);
        check(cancelled() - before <= guesses, "more guesses are cancelled than were abandoned");
        for (const int slot : wanted) {
            slot_model & model = slots_[slot];
            if (state(slot) == slot_state::READY) {
                continue;
            }
            check(state(slot) == slot_state::EMPTY, "an abandoned slot is neither ready nor empty");
            if (reads().key_of(slot) >= 0) {
                check(reads().key_of(slot) == model.key ? model.dropped : model.key < 0, "an abandoned slot keeps its key");
            } else {
                if (model.key >= 0) {
                    waiting_[model.key].on = false;
                }
                model = {};
            }
        }
    }

    void ask_keys() {
        int32_t keys[N_SLOTS];
        reads().keys(keys);
        for (int slot = 0; slot < N_SLOTS; slot++) {
            slot_model & model = slots_[slot];
            if (keys[slot] >= 0) {
                check(keys[slot] == model.key && !model.dropped, "keys() tells a key that is not coming");
            } else if (model.dropped) {
                model = {};  // told herewith
            } else if (model.key >= 0) {
                check(state(slot) == slot_state::FAILED, "keys() withholds a key");
                model.guess = false;
            }
        }
    }

    void inject() {
        const int errors[] = {EIO, EIO, 0, 0, -1};
        const int error    = errors[random_.below((int)std::size(errors))];
        injected_ += error >= 0;
        reads().inject(random_.below(6), error);
    }

    // Compares a slot with the model; on READY also its bytes.
    void look(int slot) {
        slot_model & model = slots_[slot];
        switch (state(slot)) {
            case slot_state::LOADING:
                break;
            case slot_state::EMPTY:
                check(model.key < 0 || model.dropped, "a load is lost");
                break;
            case slot_state::FAILED:
                check(model.key >= 0 && !model.dropped, "a slot fails that nobody asked for");
                failures += !model.failed;
                model.failed = true;
                check(failures <= injected_, "a read fails without an error");
                check(!reads().last_error().empty(), "a read fails without a sentence");
                break;
            case slot_state::READY:
                check(model.key >= 0 && !model.dropped && !model.failed, "a slot is ready that nobody asked for");
                check(reads().key_of(slot) == model.key, "a ready slot has another key");
                if (!model.ready) {
                    model.ready = true;
                    compare(slot, model.key);
                    demand_bytes_ += model.demand ? files_.bytes_of(model.key) : 0;
                }
                break;
        }
    }

    void compare(int slot, int key) {
        for (const auto & p : files_.keys[key]) {
            const char * want = files_.contents[p.file].data() + p.offset;
            const char * have = base(slot) + p.slot_offset;
            check((have[0] ^ (finish_ ? 1 : 0)) == want[0], "a ready slot was not finished once");
            check(memcmp(have + 1, want + 1, p.bytes - 1) == 0, "a ready slot holds other bytes");
        }
    }

    // Events come in the order in which they ended. With one lane that is the order in which their
    // chunks were taken, so what went before a demand can be counted; with more it is not known when
    // exactly a lane took a chunk.
    void read_history() {
        static moe_event events[EVENTS];
        const int        n = reads().history.read(events, EVENTS);
        check(n < EVENTS, "the program's timeline is too short");
        events_ += n;
        for (int i = 0; i < n; i++) {
            const moe_event & e = events[i];
            if (lanes_ > 1) {
                continue;
            }
            for (int key = 0; key < N_KEYS; key++) {
                waiting & w = waiting_[key];
                if (w.on && e.kind == MOE_EVENT_GUESS && e.end_ns > w.queued_ns) {
                    check(++w.guesses <= 1, "a demand waits behind two guesses");
                }
                w.on = w.on && (e.key != key || e.kind == MOE_EVENT_GUESS || e.end_ns <= w.asked_ns);
            }
        }
    }

    void drain() {
        for (int slot = 0; slot < N_SLOTS; slot++) {
            if (state(slot) == slot_state::LOADING) {
                reads().wait_any({slot});
            }
            check(state(slot) != slot_state::LOADING, "a slot still loads after the wait for it");
            look(slot);
        }
        drop(N_SLOTS, false);
        for (const slot_model & model : slots_) {
            check(!model.dropped, "a key that was given up is never reported");
        }
        read_history();
        const auto &  count = reads().count;
        const int64_t bytes = count.bytes, n = count.reads;
        check(count.guess_loads == guesses_, "guesses are miscounted");
        check(count.guess_promoted + count.guess_cancelled <= guesses_, "a guess was both promoted and cancelled");
        check(bytes <= submitted_, "more was read than asked for");
        check(count.guess_bytes + demand_bytes_ <= bytes, "less was read than arrived");
        check(n <= events_ && events_ - n <= MAX_CHUNKS * injected_, "reads are miscounted");
        check(direct_ ? count.bounced <= n : count.bounced == 0, "bounced reads are miscounted");
    }

    // What other threads may look at while the driver and the lanes work.
    void observe(const std::atomic<bool> & stop) {
        for (int64_t before = 0; !stop; usleep(200)) {
            for (int slot = 0; slot < N_SLOTS; slot++) {
                const int key = reads_->key_of(slot);
                check(key >= -1 && key < N_KEYS, "a slot has a key that does not exist");
                seen_ += reads_->coming(slot);
            }
            const int64_t now = reads_->disk_ns();
            check(now >= before, "the time of the disk goes backwards");
            before = now;
            seen_ += (int64_t)reads_->last_error().size();
        }
    }

    const blobs &               files_;
    char *                      arena_;
    random_source &             random_;
    const int                   lanes_;
    const bool                  direct_, finish_;
    std::atomic<int64_t>        finished_{0};
    int64_t                     seen_ = 0;
    slot_model                  slots_[N_SLOTS];
    waiting                     waiting_[N_KEYS];
    std::vector<int32_t>        reported_;
    int64_t                     submitted_ = 0, demand_bytes_ = 0, guesses_ = 0, injected_ = 0, events_ = 0;
    std::unique_ptr<moe::reads> reads_;  // last: its lanes use the others
};

void stuck(int) {
    static const char sentence[] = "stress: a call does not return: a wake-up is lost\n";
    _exit(write(STDERR_FILENO, sentence, sizeof(sentence) - 1) > 0 ? 3 : 4);
}

}  // namespace

int main(int argc, char ** argv) {
    const int64_t steps = argc > 1 ? atoll(argv[1]) : 1000000;
    seed                = argc > 2 ? (unsigned)atoll(argv[2]) : 1;
    random_source random{std::mt19937(seed)};
    blobs         files(argc > 3 ? argv[3] : ".", random);
    moe_probe     probe;
    moe_probe_direct(files.paths[0].c_str(), &probe);
    std::unique_ptr<char, void (*)(void *)> arena((char *)aligned_alloc(PAGE, N_SLOTS * SLOT_BYTES), free);
    signal(SIGALRM, stuck);
    int64_t loads = 0, failures = 0, reported = 0;
    // Many short runs: starting and ending with work under way is part of what is tested.
    for (int64_t run = 0; step < steps; run++) {
        const int     lanes  = 1 << run % 3;
        const bool    direct = probe.direct && run % 8 == 7;
        const auto    d      = std::make_unique<driver>(files, arena.get(), random, lanes, direct ? &probe : nullptr, run / 3 % 2 == 1);
        const int64_t n      = std::min<int64_t>(steps - step, direct ? 500 : 10000);
        d->run(n);
        loads += d->loads;
        failures += d->failures;
        reported += d->reported;
    }
    printf("stress: %lld steps, %lld loads, %lld failed, %lld guesses dropped, direct %s, seed %u\n", (long long)steps, (long long)loads,
           (long long)failures, (long long)reported, probe.direct ? "too" : "not possible here", seed);
    return 0;
}
