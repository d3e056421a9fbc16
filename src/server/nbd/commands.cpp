#include "server/nbd/commands.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"

namespace qcow::nbd {
namespace {

/// Reads of less are sent as data without asking whether they are.
constexpr std::uint64_t min_hole = 32 * KiB;

/// How far ahead extents are asked for.
constexpr std::uint64_t look_ahead = GiB;

/// Walks over what a disk says of itself end when this is over: clients ask again about the rest, and a disk can have
/// more to say than anybody waits for. One request has one of these, whatever it asks for.
class WalkTime {
public:
    /// Whether it is over; to be asked at each step. The first steps are free, so that a machine that is busy for a
    /// moment changes no answers.
    [[nodiscard]] bool is_over() {
        return ++steps_ % free_steps == 0 && std::chrono::steady_clock::now() - begin_ > limit;
    }

    /// Whether more than a few steps were made.
    [[nodiscard]] bool is_long() const { return steps_ >= free_steps; }

private:
    static constexpr unsigned free_steps = 4096;
    static constexpr auto limit = std::chrono::milliseconds(250);
    std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
    unsigned steps_ = 0;
};

class Work {
public:
    Work(const Session& session, const Request& request, KnownData& known, Pace& pace, Replies& replies)
        : session_(session),
          disk_(*session.exported->disk),
          request_(request),
          known_(known),
          pace_(pace),
          replies_(replies) {}

    Result<void> read();
    Result<void> cache();
    Result<void> block_status(std::span<const std::byte> payload);

private:
    /// How many bytes from `at` on are a hole; 0: they are not known to be.
    Result<std::uint64_t> hole_at(std::uint64_t at, std::uint64_t limit);
    Result<std::vector<Replies::Status>> runs_of(const NbdContext& context, std::uint64_t length, WalkTime& time);

    const Session& session_;
    Disk& disk_;
    const Request& request_;
    KnownData& known_;
    Pace& pace_;
    Replies& replies_;
};

Result<std::uint64_t> Work::hole_at(std::uint64_t at, std::uint64_t limit) {
    if (at >= known_.begin && at < known_.end) return 0;
    const auto extent = TRY(disk_.extent({at}, std::min(look_ahead, disk_.size() - at)));
    if (extent.kind != Extent::Kind::data) return std::min(extent.length, limit);
    known_ = {at, at + extent.length};
    return 0;
}

Result<void> Work::read() {
    std::uint64_t at = request_.offset;
    const std::uint64_t end = at + request_.length;
    const bool holes =
        replies_.style() != Style::simple && !request_.has(command_flag::df) && request_.length >= min_hole;
    if (at == end) replies_.done(request_);
    while (at < end) {
        const auto hole = holes ? TRY(hole_at(at, end - at)) : 0;
        if (hole > 0) {
            replies_.send_hole(request_, at, hole, at + hole == end);
            at += hole;
            continue;
        }
        // What is known to be data ends somewhere, and a hole may follow.
        const auto data_end = holes && at < known_.end ? std::min(end, known_.end) : end;
        const bool whole = request_.length <= replies_.chunk() && data_end == end;
        const auto piece = whole ? static_cast<std::size_t>(end - at) : next_piece(at, data_end - at, replies_.chunk());
        const auto room = replies_.data_room(request_, at, piece);
        TRY_VOID(pace_.timed(piece, [&] { return disk_.read({at}, room); }));
        replies_.send_data(request_, at, piece, at + piece == end);
        at += piece;
    }
    return {};
}

Result<void> Work::cache() {
    std::vector<std::byte> buffer(std::min<std::uint64_t>(request_.length, replies_.chunk()));
    std::uint64_t at = request_.offset;
    const std::uint64_t end = at + std::min(request_.length, max_payload);
    while (at < end) {
        const auto piece = std::min<std::uint64_t>(end - at, buffer.size());
        TRY_VOID(pace_.timed(piece, [&] { return disk_.read({at}, std::span(buffer).first(piece)); }));
        at += piece;
    }
    return {};
}

/// What the context says of the range, or of as much of it as fits into a reply and into the time; at least one run.
Result<std::vector<Replies::Status>> Work::runs_of(const NbdContext& context, std::uint64_t length, WalkTime& time) {
    std::vector<Replies::Status> runs;
    const auto most = request_.has(command_flag::req_one) ? 1 : replies_.max_statuses();
    TRY_VOID(context.status(
        {request_.offset}, length,
        [&](const NbdStatus& run) {
            if (!runs.empty() && runs.back().flags == run.flags) {
                runs.back().length += run.length;
            } else if (runs.size() < most) {
                runs.push_back({run.length, run.flags});
            } else {
                return false;
            }
            return !time.is_over();
        }));
    return runs;
}

Result<void> Work::block_status(std::span<const std::byte> payload) {
    const auto invalid = [](std::string why) { return fail(Errc::invalid_argument, "", std::move(why)); };
    std::uint64_t length = request_.length;
    std::vector<std::uint32_t> ids;
    if (request_.has(command_flag::payload_length)) {
        // The length of the range, and the contexts that are asked for.
        length = load_be<std::uint64_t>(payload, 0);
        for (std::size_t i = 8; i + 4 <= payload.size(); i += 4) ids.push_back(load_be<std::uint32_t>(payload, i));
        if (length == 0 || !lies_within(request_.offset, length, disk_.size()))
            return invalid("not a range of the export");
    } else {
        for (std::uint32_t id = 0; id < session_.contexts.size(); ++id) ids.push_back(id);
    }
    if (ids.empty()) return invalid("no contexts were agreed on");
    if (std::ranges::any_of(ids, [&](auto id) { return id >= session_.contexts.size(); }))
        return invalid("a context that was not agreed on");
    WalkTime time;
    for (std::size_t i = 0; i < ids.size(); ++i) {
        const auto runs = TRY(pace_.timed(0, [&] { return runs_of(*session_.contexts[ids[i]], length, time); }));
        replies_.send_status(request_, ids[i], runs, i + 1 == ids.size());
    }
    // A client that has asked for much of the kind may be gone, which sending shows.
    if (time.is_long()) replies_.flush();
    return {};
}

/// What a command does to the disk, for those that have no data in either direction.
Result<void> change(Disk& disk, const Request& request) {
    switch (request.command) {
        case Command::flush: return disk.flush();
        case Command::trim: return disk.discard({request.offset}, request.length);
        case Command::write_zeroes:
            // This changes only metadata, except in the blocks at both ends: as fast as FAST_ZERO asks for.
            return disk.write_zeroes({request.offset}, request.length,
                                     request.has(command_flag::no_hole) ? Disk::Zeroes::keep : Disk::Zeroes::release);
        default: return fail(Errc::unsupported, "", "unknown command");
    }
}

}  // namespace

std::size_t next_piece(std::uint64_t at, std::uint64_t length, std::size_t chunk) {
    return static_cast<std::size_t>(std::min(length, chunk - at % chunk));
}

void finish_change(const Session& session, const Request& request, Result<void> result, Replies& replies) {
    if (result && request.has(command_flag::fua)) result = session.exported->disk->flush();
    if (result) {
        replies.done(request);
    } else {
        replies.failed(request, failure_from(result.error().code), result.error().message());
    }
}

void perform(const Session& session, const Request& request, std::span<const std::byte> payload, KnownData& known,
             Pace& pace, Replies& replies) {
    Work work(session, request, known, pace, replies);
    Result<void> result;
    switch (request.command) {
        case Command::read: result = work.read(); break;
        case Command::block_status: result = work.block_status(payload); break;
        case Command::cache:
            result = work.cache();
            if (result) replies.done(request);
            break;
        default: {
            auto& disk = *session.exported->disk;
            finish_change(session, request, pace.timed(0, [&] { return change(disk, request); }), replies);
        }
    }
    if (!result) replies.failed(request, failure_from(result.error().code), result.error().message());
}

}  // namespace qcow::nbd
