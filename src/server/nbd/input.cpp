#include "server/nbd/input.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace qcow::nbd {

Input::Input(Stream& stream, std::size_t capacity)
    : stream_(stream), capacity_(capacity), buffer_(std::make_unique_for_overwrite<std::byte[]>(capacity)) {}

std::optional<std::span<const std::byte>> Input::take(std::size_t count) {
    assert(count <= capacity_);
    if (begin_ == end_) begin_ = end_ = 0;
    if (capacity_ - begin_ < count) {
        std::memmove(buffer_.get(), buffer_.get() + begin_, buffered());
        end_ -= begin_;
        begin_ = 0;
    }
    while (buffered() < count) {
        const auto received = stream_.receive({buffer_.get() + end_, capacity_ - end_});
        if (received == 0) return std::nullopt;
        end_ += received;
    }
    const std::span<const std::byte> taken(buffer_.get() + begin_, count);
    begin_ += count;
    return taken;
}

bool Input::take_into(std::span<std::byte> to) {
    const auto ready = std::min(to.size(), buffered());
    if (ready > 0) std::memcpy(to.data(), buffer_.get() + begin_, ready);
    begin_ += ready;
    to = to.subspan(ready);
    while (!to.empty()) {
        const auto received = stream_.receive(to);
        if (received == 0) return false;
        to = to.subspan(received);
    }
    return true;
}

bool Input::skip(std::uint64_t count) {
    while (count > 0) {
        const auto piece = static_cast<std::size_t>(std::min<std::uint64_t>(count, capacity_));
        if (!take(piece)) return false;
        count -= piece;
    }
    return true;
}

}  // namespace qcow::nbd
