#pragma once
// Replies in the making: one thread's, on their way to the Output.

#include <memory>
#include <optional>

#include "server/nbd/output.h"
#include "server/nbd/protocol.h"

namespace qcow::nbd {

/// Collects the replies of one thread in a buffer, into which disks are read directly: header and data lie side by
/// side, and go out without being copied, as many as there are at once. Not thread-safe.
class Replies {
public:
    /// `chunk`: bytes of data in one piece, at most.
    Replies(Output& output, Style style, std::size_t chunk);

    [[nodiscard]] Style style() const { return style_; }
    [[nodiscard]] std::size_t chunk() const { return chunk_; }

    /// The request is done, without data.
    void done(const Request& request);

    /// The request failed. After parts of a simple reply have gone out, the client can be told so only by hanging up.
    void failed(const Request& request, Failure failure, std::string_view why);

    /// Where `count` (at most chunk()) bytes of data are to be put that send_data then sends.
    std::span<std::byte> data_room(const Request& request, std::uint64_t offset, std::size_t count);

    /// The bytes that were put into data_room. `last`: the request is done.
    void send_data(const Request& request, std::uint64_t offset, std::size_t count, bool last);

    /// `count` zeros; not for simple replies.
    void send_hole(const Request& request, std::uint64_t offset, std::uint64_t count, bool last);

    struct Status {
        std::uint64_t length = 0;
        std::uint32_t flags = 0;
    };
    /// How many runs fit into one chunk.
    [[nodiscard]] std::size_t max_statuses() const { return chunk_ / 16 - 1; }
    /// What the context `id` says of the requested range.
    void send_status(const Request& request, std::uint32_t id, std::span<const Status> runs, bool last);

    /// Sends what there is.
    void flush();

    /// For when not even an error can be said.
    void hang_up();

    /// Sends it if it is worth a system call.
    void flush_if_many();

private:
    std::span<std::byte> room(std::size_t count);
    std::span<std::byte> chunk_room(const Request& request, std::uint16_t type, bool last, std::size_t length);
    [[nodiscard]] std::size_t data_header_size() const;

    Output& output_;
    Style style_;
    std::size_t chunk_;
    std::size_t capacity_;
    std::unique_ptr<std::byte[]> buffer_;
    std::size_t used_ = 0;
    std::optional<Output::Turn> turn_;  // of a simple reply that goes out in several pieces
};

}  // namespace qcow::nbd
