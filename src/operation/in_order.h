#pragma once
// Work on several threads whose results are taken in order.

#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>

#include "base/try.h"
#include "base/within_memory.h"
#include "base/workers.h"

namespace qcow {

/// Runs a job that consists of pieces. The job has these members:
///
///   using Memory = ...;                                    a worker's own
///   Result<std::optional<Piece>> next();                   the next piece, in order; nothing at the end
///   Result perform(const Piece& piece, Memory& memory);    does the work, on all threads at once
///   Result<bool> settle(Result result);                    takes the results, in order; false ends the run
///
/// Only `perform` runs on several threads at once. An error of the others ends the run.
template <class Job>
Result<void> run_in_order(unsigned workers, Job& job) {
    using Outcome = decltype(job.perform(**job.next(), std::declval<typename Job::Memory&>()));
    // A bound on memory. It is far off: a worker that the system stops for a moment holds up nobody.
    constexpr std::uint64_t most_ahead = 1024;
    std::mutex mutex;  // guards all that follows, and the job except for `perform`
    std::condition_variable changed;
    std::map<std::uint64_t, Outcome> ready;
    std::uint64_t next_number = 0;
    std::uint64_t next_to_settle = 0;
    bool ended = false;

    const auto work = [&]() -> Result<void> {
        typename Job::Memory memory;
        std::unique_lock lock(mutex);
        while (!ended) {
            if (next_number - next_to_settle >= most_ahead) {
                changed.wait(lock);
                continue;
            }
            const auto piece = TRY(job.next());
            if (!piece) break;
            const auto number = next_number++;
            lock.unlock();
            auto outcome = job.perform(*piece, memory);
            lock.lock();
            ready.emplace(number, std::move(outcome));
            while (!ended && !ready.empty() && ready.begin()->first == next_to_settle) {
                ended = !TRY(job.settle(std::move(ready.extract(ready.begin()).mapped())));
                ++next_to_settle;
            }
            changed.notify_all();
        }
        return {};
    };
    return run_workers(workers, [&](unsigned) {
        auto result = within_memory(work);
        if (!result) {
            const std::lock_guard lock(mutex);
            ended = true;
            changed.notify_all();
        }
        return result;
    });
}

}  // namespace qcow
