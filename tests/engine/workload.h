#pragma once
// Random work of whole sectors, by one or more threads, with a model of what the disk may hold.

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/guest.h"
#include "support/random.h"

namespace qcow::test {

/// What is done how often, relative to each other.
struct Mix {
    unsigned write = 10;
    unsigned write_compressed = 0;
    unsigned zero = 0;
    unsigned discard = 0;
    unsigned flush = 1;
    unsigned resize = 0;  ///< of one thread only
    unsigned read = 0;
    unsigned snapshot = 0;  ///< of one thread only
    unsigned empty = 0;     ///< of one thread only

    std::uint64_t longest = 64;      ///< sectors a request
    std::uint64_t window = 0;        ///< sectors from the front that are used; 0: all
    bool sequential = false;         ///< each write follows the one before
    std::uint64_t resized_most = 0;  ///< sectors
    bool shrink = true;
};

/// One thread's share. What fails is for the caller, or an exception.
class Worker {
public:
    Worker(Guest& guest, const Mix& mix, Random random) : guest_(guest), mix_(mix), random_(std::move(random)) {}

    Result<void> step();

private:
    Guest& guest_;
    Mix mix_;
    Random random_;
    std::uint64_t next_ = 0;
};

/// Runs `work(thread number)` in that many threads, a single one on the caller's. The first exception is passed on when
/// all are done.
template <class Work>
void in_threads(unsigned threads, const Work& work) {
    if (threads == 1) return work(0);
    std::mutex mutex;
    std::string failure;
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t) {
        running.emplace_back([&, t] {
            try {
                work(t);
            } catch (const std::exception& e) {
                const std::lock_guard lock(mutex);
                if (failure.empty()) failure = e.what();
            }
        });
    }
    for (auto& thread : running) thread.join();
    if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace qcow::test
