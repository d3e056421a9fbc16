#include "qcow2/metadata/reservations.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <utility>

#include "base/bits.h"

namespace qcow::qcow2 {
namespace {

constexpr std::size_t max_windows = 64;
constexpr std::uint64_t window_growth = 4;  // from one window to the next
constexpr std::uint64_t min_reach = 256;    // clusters: requests in flight arrive out of order

}  // namespace

std::optional<ClusterRun> Reservations::take_for(std::uint64_t guest, std::uint64_t wanted) {
    auto found = windows_.upper_bound(guest);
    if (found == windows_.begin()) return std::nullopt;
    auto& [first, window] = *std::prev(found);
    if (guest - first >= window.count) return std::nullopt;
    const std::uint64_t host = window.host + (guest - first);
    const auto run = std::ranges::find_if(window.free, [&](const ClusterRun& r) { return r.end() > host; });
    if (run == window.free.end() || run->first > host) return std::nullopt;
    const ClusterRun taken{host, std::min(wanted, run->end() - host)};
    const ClusterRun behind{taken.end(), run->end() - taken.end()};
    run->count = host - run->first;
    if (run->count == 0 && behind.count == 0) {
        window.free.erase(run);
    } else if (run->count == 0) {
        *run = behind;
    } else if (behind.count != 0) {
        window.free.insert(std::next(run), behind);
    }
    window.used = ++now_;
    taken_ += taken.count;
    free_ -= taken.count;
    return taken;
}

std::optional<ClusterRun> Reservations::take_spare(std::uint64_t guest, std::uint64_t wanted) {
    const auto run = std::ranges::find_if(spare_, [&](const ClusterRun& r) { return r.count >= wanted; });
    if (run == spare_.end()) return std::nullopt;
    const ClusterRun taken{run->first, wanted};
    run->first += wanted;
    run->count -= wanted;
    if (run->count == 0) spare_.erase(run);
    taken_ += wanted;
    open_window({guest, wanted}, taken.first, false);
    return taken;
}

std::optional<ClusterRun> Reservations::take_any() {
    Window* oldest = nullptr;
    for (auto& [first, window] : windows_) {
        if (!window.free.empty() && (oldest == nullptr || window.used < oldest->used)) oldest = &window;
    }
    if (oldest == nullptr) return std::nullopt;
    auto& run = oldest->free.back();
    const ClusterRun taken{run.end() - 1, 1};
    if (--run.count == 0) oldest->free.pop_back();
    ++taken_;
    --free_;
    return taken;
}

std::optional<GuestRun> Reservations::next_window(std::uint64_t guest, std::uint64_t wanted, std::uint64_t disk) const {
    std::uint64_t lower = 0;
    std::uint64_t upper = std::max(disk, guest + 1);
    std::uint64_t size = 0;
    const auto after = windows_.upper_bound(guest);
    if (after != windows_.begin()) {
        const auto& [first, window] = *std::prev(after);
        lower = first + window.count;
        if (lower > guest) return std::nullopt;  // another one has taken its place in the window
        if (guest - lower <= std::max(window.count, min_reach)) size = window.count * window_growth;
    }
    if (after != windows_.end()) {
        upper = after->first;
        if (upper - guest <= std::max(after->second.count, min_reach))
            size = std::max(size, after->second.count * window_growth);
    }
    if (size == 0) return std::nullopt;
    // A crash leaks what is reserved: not much more than has been of use.
    const std::uint64_t budget = window_growth * taken_ - std::min(window_growth * taken_, free_);
    if (budget < wanted) return std::nullopt;
    size = std::max(wanted, std::min({size, budget, most_}));
    const std::uint64_t first = std::max(lower, align_down(guest, std::bit_floor(size)));
    return GuestRun{first, std::min(upper, std::max(first + size, guest + wanted)) - first};
}

void Reservations::add(GuestRun guest, std::span<const ClusterRun> runs) {
    for (const auto& run : runs) {
        const std::uint64_t count = open_window({guest.first, std::min(run.count, guest.count)}, run.first, true);
        if (count < run.count) spare_.push_back({run.first + count, run.count - count});
        guest = {guest.first + count, count < run.count ? 0 : guest.count - count};
    }
}

/// Makes a window of the first guest clusters of the run, as many as have none yet; gives how many those are.
std::uint64_t Reservations::open_window(GuestRun guest, std::uint64_t host, bool free) {
    const auto after = windows_.upper_bound(guest.first);
    if (after != windows_.begin()) {
        const auto& [first, window] = *std::prev(after);
        if (first + window.count > guest.first) return 0;
    }
    if (after != windows_.end()) guest.count = std::min(guest.count, after->first - guest.first);
    if (guest.count == 0) return 0;
    auto& window = windows_[guest.first];
    window = {host, guest.count, {}, ++now_};
    if (free) {
        window.free.push_back({host, guest.count});
        free_ += guest.count;
    }
    if (windows_.size() > max_windows) drop_oldest();
    return guest.count;
}

void Reservations::drop_oldest() {
    const auto oldest = std::ranges::min_element(windows_, {}, [](const auto& entry) { return entry.second.used; });
    const auto& free = oldest->second.free;
    for (const auto& run : free) free_ -= run.count;
    spare_.insert(spare_.end(), free.begin(), free.end());
    windows_.erase(oldest);
}

std::vector<ClusterRun> Reservations::take_all() {
    auto all = std::exchange(spare_, {});
    for (const auto& [first, window] : windows_) all.insert(all.end(), window.free.begin(), window.free.end());
    windows_.clear();
    free_ = 0;
    std::ranges::sort(all, {}, &ClusterRun::first);
    return all;
}

}  // namespace qcow::qcow2
