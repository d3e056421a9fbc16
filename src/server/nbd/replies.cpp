#include "server/nbd/replies.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/endian.h"

namespace qcow::nbd {
namespace {

/// Where a client that is fed more replies at once would begin to wait for them.
constexpr std::size_t many = std::size_t{64} << 10;

/// The largest header that data has in front of it.
constexpr std::size_t max_header = 40;

}  // namespace

Replies::Replies(Output& output, Style style, std::size_t chunk)
    : output_(output),
      style_(style),
      chunk_(chunk),
      capacity_(many + max_header + chunk),
      buffer_(std::make_unique_for_overwrite<std::byte[]>(capacity_)) {}

std::span<std::byte> Replies::room(std::size_t count) {
    assert(count <= capacity_);
    if (count > capacity_ - used_) flush();
    return {buffer_.get() + used_, count};
}

std::span<std::byte> Replies::chunk_room(const Request& request, std::uint16_t type, bool last, std::size_t length) {
    const auto header = chunk_header_size(style_);
    const auto bytes = room(header + length);
    put_chunk(bytes, style_, request, type, last, length);
    used_ += bytes.size();
    return bytes.subspan(header);
}

void Replies::done(const Request& request) {
    if (style_ == Style::extended) {
        chunk_room(request, chunk_type::none, true, 0);
    } else {
        put_simple_reply(room(simple_reply_size), request, 0);
        used_ += simple_reply_size;
    }
}

void Replies::failed(const Request& request, Failure failure, std::string_view why) {
    if (turn_) {
        output_.hang_up();
        turn_.reset();
        used_ = 0;
    } else if (style_ == Style::simple) {
        put_simple_reply(room(simple_reply_size), request, static_cast<std::uint32_t>(failure));
        used_ += simple_reply_size;
    } else {
        why = why.substr(0, max_string);
        const auto bytes = chunk_room(request, chunk_type::error, true, 6 + why.size());
        store_be<std::uint32_t>(bytes, 0, static_cast<std::uint32_t>(failure));
        store_be<std::uint16_t>(bytes, 4, static_cast<std::uint16_t>(why.size()));
        std::memcpy(bytes.data() + 6, why.data(), why.size());
    }
}

std::size_t Replies::data_header_size() const {
    return style_ == Style::simple ? simple_reply_size : chunk_header_size(style_) + 8;
}

std::span<std::byte> Replies::data_room(const Request& request, std::uint64_t offset, std::size_t count) {
    assert(count <= chunk_);
    const bool headless = style_ == Style::simple && offset != request.offset;
    const auto header = headless ? 0 : data_header_size();
    return room(header + count).subspan(header);
}

void Replies::send_data(const Request& request, std::uint64_t offset, std::size_t count, bool last) {
    if (style_ == Style::simple) {
        if (offset == request.offset) {
            put_simple_reply({buffer_.get() + used_, simple_reply_size}, request, 0);
            used_ += simple_reply_size;
            if (!last) {
                used_ += count;
                // The pieces of this reply have nothing that tells them from others'.
                turn_.emplace(output_);
                flush();
                return;
            }
        }
        used_ += count;
        if (turn_ && last) {
            flush();
            turn_.reset();
        }
        return;
    }
    const auto header = chunk_header_size(style_);
    const std::span<std::byte> bytes(buffer_.get() + used_, header + 8);
    put_chunk(bytes, style_, request, chunk_type::offset_data, last, 8 + count);
    store_be<std::uint64_t>(bytes, header, offset);
    used_ += bytes.size() + count;
}

void Replies::send_hole(const Request& request, std::uint64_t offset, std::uint64_t count, bool last) {
    const auto bytes = chunk_room(request, chunk_type::offset_hole, last, 12);
    store_be<std::uint64_t>(bytes, 0, offset);
    store_be<std::uint32_t>(bytes, 8, static_cast<std::uint32_t>(count));
}

void Replies::send_status(const Request& request, std::uint32_t id, std::span<const Status> runs, bool last) {
    const bool extended = style_ == Style::extended;
    const std::size_t header = extended ? 8 : 4;
    const std::size_t each = extended ? 16 : 8;
    const auto type = extended ? chunk_type::block_status_ext : chunk_type::block_status;
    const auto bytes = chunk_room(request, type, last, header + each * runs.size());
    store_be<std::uint32_t>(bytes, 0, id);
    if (extended) store_be<std::uint32_t>(bytes, 4, static_cast<std::uint32_t>(runs.size()));
    std::size_t at = header;
    for (const auto& run : runs) {
        if (extended) {
            store_be<std::uint64_t>(bytes, at, run.length);
            store_be<std::uint64_t>(bytes, at + 8, run.flags);
        } else {
            store_be<std::uint32_t>(bytes, at, static_cast<std::uint32_t>(run.length));
            store_be<std::uint32_t>(bytes, at + 4, run.flags);
        }
        at += each;
    }
}

void Replies::flush() {
    if (used_ == 0) return;
    const std::span<const std::byte> bytes(buffer_.get(), used_);
    used_ = 0;
    if (turn_) {
        turn_->send(bytes);
    } else {
        output_.send(bytes);
    }
}

void Replies::hang_up() {
    used_ = 0;
    output_.hang_up();  // first: whoever has the next turn must not go on in the middle of a reply
    turn_.reset();
}

void Replies::flush_if_many() {
    if (used_ >= many) flush();
}

}  // namespace qcow::nbd
