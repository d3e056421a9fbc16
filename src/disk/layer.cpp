#include "disk/layer.h"

#include <algorithm>

#include "base/bits.h"
#include "base/buffers.h"
#include "base/try.h"

namespace qcow {

Result<void> Layer::verify_writable() const {
    if (write_) return {};
    const auto names = files();
    return fail(Errc::read_only, names.empty() ? "" : names.front(), "opened for reading only");
}

/// Comes after every change.
Result<void> Layer::finish(Result<void> changed) {
    return changed && write_->cache == CacheMode::writethrough ? do_flush() : changed;
}

Result<void> Layer::do_write(GuestOffset at, ConstBuffers from) {
    return finish(write_->detect_zeroes == DetectZeroes::off ? write_data(at, from) : write_detecting_zeroes(at, from));
}

/// Block by block, where each is zeros or is not.
Result<void> Layer::write_detecting_zeroes(GuestOffset at, ConstBuffers from) {
    const auto zeroes = write_->detect_zeroes == DetectZeroes::on ? Zeroes::keep : Zeroes::release;
    while (!from.empty()) {
        const std::uint64_t left = block_size() - at.value % block_size();
        const auto part = from.first(std::min<std::uint64_t>(left, from.size()));
        TRY_VOID(all_zeros(part) ? zero(at, part.size(), zeroes) : write_data(at, part));
        at += part.size();
        from = from.subspan(part.size());
    }
    return {};
}

Result<void> Layer::do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) {
    return finish(zero(at, length, zeroes));
}

Result<void> Layer::do_discard(GuestOffset at, std::uint64_t length) {
    const GuestOffset begin{divide_up(at.value, block_size()) * block_size()};
    const GuestOffset end{at.value + length == size() ? size() : align_down(at.value + length, block_size())};
    return write_->discard && begin < end ? finish(drop(begin, end - begin)) : Result<void>();
}

Result<void> Layer::do_write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level) {
    return finish(write_compressed_data(at, from, level));
}

Result<void> Layer::write_data(GuestOffset, ConstBuffers) { return verify_writable(); }
Result<void> Layer::zero(GuestOffset, std::uint64_t, Zeroes) { return verify_writable(); }
Result<void> Layer::drop(GuestOffset, std::uint64_t) { return verify_writable(); }
Result<void> Layer::write_compressed_data(GuestOffset at, std::span<const std::byte> from, std::optional<int> level) {
    return Image::do_write_compressed(at, from, level);
}

}  // namespace qcow
