#include "base/workers.h"

#include <sched.h>

#include <algorithm>
#include <cassert>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include "base/within_memory.h"

namespace qcow {

unsigned default_workers() {
    cpu_set_t usable;
    CPU_ZERO(&usable);
    if (sched_getaffinity(0, sizeof usable, &usable) == 0)
        return static_cast<unsigned>(std::max(1, CPU_COUNT(&usable)));
    return std::max(1U, std::thread::hardware_concurrency());
}

Result<void> run_workers(unsigned count, const std::function<Result<void>(unsigned)>& work) {
    assert(count > 0);
    std::mutex mutex;
    std::optional<Error> first_error;
    const auto run = [&](unsigned index) {
        if (auto result = within_memory([&] { return work(index); }); !result) {
            const std::lock_guard lock(mutex);
            if (!first_error) first_error = std::move(result).error();
        }
    };
    {
        std::vector<std::jthread> threads;
        threads.reserve(count);
        for (unsigned i = 0; i + 1 < count; ++i) {
            try {
                threads.emplace_back(run, i);
            } catch (const std::system_error&) {
                break;
            } catch (const std::bad_alloc&) {
                break;
            }
        }
        run(count - 1);
    }
    if (first_error) return std::unexpected(std::move(*first_error));
    return {};
}

}  // namespace qcow
