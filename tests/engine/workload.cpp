#include "engine/workload.h"

namespace qcow::test {

Result<void> Worker::step() {
    auto dice = random_.below(mix_.write + mix_.write_compressed + mix_.zero + mix_.discard + mix_.flush + mix_.resize +
                              mix_.read + mix_.snapshot + mix_.empty);
    const auto is = [&](unsigned share) {
        if (dice < share) return true;
        dice -= share;
        return false;
    };
    const auto size = guest_.sectors();
    const auto window = mix_.window == 0 ? size : std::min(mix_.window, size);
    auto first = random_.below(window);
    auto count = random_.between(1, std::min(mix_.longest, window - first));
    const auto block = std::max<std::uint64_t>(1, guest_.image().block_size() / sector_bytes);
    if (is(mix_.flush)) return guest_.flush();
    if (is(mix_.snapshot)) return guest_.change_snapshots(random_.below(1000));
    if (is(mix_.empty)) return guest_.make_empty();
    if (is(mix_.zero)) {
        return guest_.write_zeroes(first, count, random_.pick({Disk::Zeroes::keep, Disk::Zeroes::release}));
    }
    if (is(mix_.discard)) {
        if (random_.chance(70)) {
            first = first / block * block;
            count = std::min(random_.between(1, 4) * block, size - first);
        }
        return guest_.discard(first, count);
    }
    if (is(mix_.write_compressed)) {
        first = first / block * block;
        return guest_.write_compressed(first, std::min(random_.between(1, 3) * block, size - first));
    }
    if (is(mix_.resize)) {
        const auto target = mix_.shrink ? random_.between(1, mix_.resized_most)
                                        : random_.between(size, std::max(size, mix_.resized_most));
        return guest_.resize(target, Image::Shrink::allow);
    }
    if (is(mix_.read)) {
        const auto wrong = guest_.inspect(first, count);
        if (!wrong) return std::unexpected(wrong.error());
        if (*wrong) throw std::runtime_error(**wrong);
        return {};
    }
    if (mix_.sequential) {
        first = next_ < window ? next_ : 0;
        count = std::min(count, window - first);
        next_ = first + count;
    }
    return guest_.write(first, count);
}

}  // namespace qcow::test
