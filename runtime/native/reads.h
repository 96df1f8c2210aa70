// Reads expert parts from disk into slots with a few threads ("lanes").
//
// Owns: the files, the lanes, their queues (demand before guess) and the state of every slot.
// Does not know: experts, layers, policies, ggml. A slot is filled by one job at a time; a job is
// a list of parts, cut into chunks so that one big expert uses all lanes. Errands are read besides
// the slots, into memory of whoever sent them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "os.h"
#include "timeline.h"

namespace moe {

// Most matrices of experts are one request: beside threads that compute every further one costs (LOG.md). A
// chunk of a guess is also the longest time a demand can wait behind one that a lane has already started.
constexpr int64_t CHUNK_BYTES       = 2 << 20;
constexpr int64_t GUESS_CHUNK_BYTES = CHUNK_BYTES / 2;
// So many lanes guess at a time, since a demand would wait behind what more of them begin; but all do for large groups,
// whose next layer is known well and streams through.
constexpr int GUESS_LANES = 2, LARGE_GROUP = 16;
// The longest range of an errand: what a lane keeps in memory for it.
constexpr int64_t RANGE_BYTES = 64 << 10;

struct read_options {
    int  lanes        = 4;
    bool direct       = false;
    int  offset_align = 4096;
    int  memory_align = 4096;
    // Called by a lane when the last byte of a slot is there, before anyone is told: (slot, key).
    std::function<void(int, int)> finish;
};

struct part {
    int     file;
    int64_t offset;
    int64_t bytes;
    char *  dest;
};

// Small and scattered ranges of files, and the pieces of them that are wanted. A range passes through
// the lane's own memory, so that nothing here need be aligned. Filled, sent once, and left alone until
// it is done.
struct errand {
    struct piece {
        int64_t offset;  // in the file
        int64_t bytes;
        char *  dest;
    };
    struct range {
        int     file;
        int64_t offset;
        int64_t bytes;       // at most RANGE_BYTES
        int     first, end;  // its pieces
    };
    std::vector<piece> pieces;
    std::vector<range> ranges;
    std::string        error;    // once it is done: of a range that failed
    std::atomic<int>   left{0};  // ranges

    bool done() const { return left.load(std::memory_order_acquire) == 0; }
};

enum class slot_state : uint8_t { EMPTY, LOADING, READY, FAILED };

class reads {
  public:
    // Throws std::runtime_error naming the file that cannot be opened.
    reads(const std::vector<std::string> & paths, const read_options & options);
    ~reads();
    reads(const reads &)             = delete;
    reads & operator=(const reads &) = delete;

    void resize(int n_slots);

    // Starts filling a slot with `key`; whatever the slot was loading is cancelled first.
    void submit(int slot, int key, const std::vector<part> & parts, bool guess);
    // A guess that is demanded now: its queued chunks move to the demand queue. Whether it was one
    // and is still being read.
    bool promote(int slot);
    // Drops guesses that no lane is at work on at this moment; returns how many slots became empty.
    int cancel_guesses();
    // Gives up guesses that turned out wrong: nothing more of them is read. Appends the keys of those
    // whose slots are empty now, also of earlier ones that a lane was still reading then.
    void drop_guesses(const std::function<bool(int)> & is_wrong, std::vector<int32_t> & keys, size_t limit);

    // Any thread may ask these; the calls above and below that change slots are one thread's at a time.
    // Time in which some lane was reading into a slot, up to now. Like count.bytes without errands, whose
    // small reads say nothing of how fast an expert comes.
    int64_t    disk_ns();
    int        key_of(int slot) const { return slots_[slot].key; }
    slot_state state(int slot) const { return slots_[slot].state.load(std::memory_order_acquire); }
    // Whether the slot holds its key or will without being asked again.
    bool coming(int slot) const {
        const slot_state s = state(slot);
        return s == slot_state::READY || (s == slot_state::LOADING && !slots_[slot].dropped);
    }

    // Blocks until a slot of `wanted` is no longer LOADING.
    void wait_any(const std::vector<int> & wanted);
    // How many reads into slots have ended; and blocks until there are more than `seen`. Any thread.
    int64_t ended();
    void    wait_beyond(int64_t seen);
    // Blocks until nothing is loading into `wanted`, forgetting what was loading.
    void abandon(const std::vector<int> & wanted);
    void keys(int32_t * out);

    // Starts reading; what nobody waits for yet comes after the experts that a layer waits for.
    void send(const std::shared_ptr<errand> & e, bool urgent);
    // Blocks until it is done; any number of threads may.
    void wait(const std::shared_ptr<errand> & e);

    // A step of so many sequences begins.
    void step(int n_sequences);

    std::string last_error();
    void        inject(int skip, int err);

    struct counters {
        std::atomic<int64_t> bytes{0}, guess_bytes{0}, errand_bytes{0}, reads{0}, bounced{0};
        std::atomic<int64_t> guess_loads{0}, guess_promoted{0}, guess_cancelled{0};
    } count;
    timeline history;

  private:
    struct chunk {
        int     slot;
        int     file;
        int64_t offset;
        int64_t bytes;
        char *  dest;
    };
    struct slot_info {
        // All is written under the lock; the atomics are also read without it.
        std::atomic<slot_state> state{slot_state::EMPTY};
        std::atomic<int>        key{-1};
        std::atomic<bool>       dropped{false};  // a wrong guess: becomes EMPTY when its last read returns
        int                     queued    = 0;   // chunks waiting
        int                     in_flight = 0;   // chunks a lane is reading
        bool                    guess     = false;
        bool                    failed    = false;
        bool                    cancelled = false;
        bool                    finishing = false;  // a lane is in options.finish
    };

    using ranges = std::deque<std::pair<std::shared_ptr<errand>, int>>;

    bool may_guess() const { return !guess_.empty() && guessing_lanes_ < (n_sequences_ < LARGE_GROUP ? GUESS_LANES : options_.lanes); }
    void lane(int number);
    void run_chunk(std::unique_lock<std::mutex> & lock, int number, char * bounce);
    void run_range(std::unique_lock<std::mutex> & lock, ranges & queue, char *& memory);
    std::string read_chunk(const chunk & c, char * bounce);
    std::string read_range(const errand & e, const errand::range & r, char * memory);
    std::string read_around(int file, int64_t offset, int64_t bytes, char * dest);
    void        cancel_locked(std::unique_lock<std::mutex> & lock, int slot);
    void        remove_queued(std::deque<chunk> & queue, int slot);
    void        finish_if_done(std::unique_lock<std::mutex> & lock, int slot);

    std::vector<std::string> paths_;
    std::vector<os::file>    files_;
    read_options             options_;
    std::mutex               mutex_;
    std::condition_variable  work_, done_;
    std::deque<chunk>        demand_, guess_;
    ranges                   urgent_, ahead_;  // of errands: before demand_, and after it
    std::deque<slot_info>    slots_;           // deque: atomics do not move
    std::vector<int>         guessing_;        // slots that hold or await a guess nobody demanded
    int64_t                  ended_           = 0;
    int                      guessing_lanes_  = 0;
    int                      n_sequences_     = 1;  // of the running step
    int                      active_          = 0;  // lanes reading into slots
    int64_t                  active_since_ns_ = 0, disk_ns_ = 0;
    std::vector<std::thread> lanes_;
    std::string              error_;
    bool                     stop_ = false;
    std::atomic<int>         inject_skip_{-1};
    std::atomic<int>         inject_err_{0};
};

}  // namespace moe
