#include "server/nbd/connection.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "base/bits.h"
#include "base/within_memory.h"
#include "server/crew.h"
#include "server/nbd/commands.h"
#include "server/nbd/handshake.h"

namespace qcow::nbd {
namespace {

/// A write that is done in several tasks.
struct SplitWrite {
    Request request;
    std::atomic<std::size_t> left;
    std::mutex mutex;
    Result<void> result = {};  // the first error

    SplitWrite(const Request& its_request, std::size_t pieces) : request(its_request), left(pieces) {}

    /// Whether this was the last piece.
    bool done(Result<void> piece) {
        if (!piece) {
            const std::lock_guard lock(mutex);
            if (result) result = std::move(piece);
        }
        return --left == 0;
    }
};

/// The part of a connection after the handshake. Requests are taken from the input and done on the spot, one after the
/// other, their replies leaving together when there is nothing more to take; or, where they are known to take long
/// (see Pace), by the crew. A system call or two a request is all that a small one costs so, and nobody is woken up.
class Transmission {
public:
    Transmission(Stream& stream, Input& input, const Session& session, const NbdLimits& limits)
        : input_(input),
          session_(session),
          disk_(*session.exported->disk),
          bounds_{disk_.size(), session.exported->read_only, chunk_bytes(disk_)},
          output_(stream),
          replies_(make_replies()),
          crew_(limits.workers, limits.connection_bytes) {}

    void run();

private:
    /// What a thread of the crew needs besides its task.
    struct Tools {
        explicit Tools(Transmission& transmission) : replies(transmission.make_replies()) {}
        Replies replies;
        KnownData known;
    };

    [[nodiscard]] Replies make_replies() { return {output_, session_.style, bounds_.chunk}; }
    [[nodiscard]] Pace& pace_of(const Request& request);
    [[nodiscard]] bool for_the_crew(const Request& request);

    std::optional<std::span<const std::byte>> take(std::size_t count);
    bool handle(const Request& request);
    bool write_here(const Request& request);
    bool write_elsewhere(const Request& request);
    template <class Work>
    void give_to_crew(std::uint64_t bytes, Work&& work);
    [[nodiscard]] std::unique_ptr<Tools> take_tools();

    Input& input_;
    const Session& session_;
    Disk& disk_;
    Bounds bounds_;
    Output output_;
    Replies replies_;
    KnownData known_;
    std::array<Pace, command_count> paces_;
    std::mutex tools_mutex_;
    std::vector<std::unique_ptr<Tools>> tools_;  // that no task uses
    Crew crew_;                                  // last, as its tasks use the others
};

Pace& Transmission::pace_of(const Request& request) {
    // What ends with a flush takes as long as one.
    const auto command = request.has(command_flag::fua) ? Command::flush : request.command;
    return paces_[static_cast<std::size_t>(command)];
}

bool Transmission::for_the_crew(const Request& request) {
    if (!crew_.exists()) return false;
    // Of large requests two are done at once, even if the disk is quick: one here, one there.
    const bool large = request.length >= 128 * KiB && input_.buffered() > 0 && crew_.is_idle();
    return large || pace_of(request).is_slow();
}

std::optional<std::span<const std::byte>> Transmission::take(std::size_t count) {
    // Nobody waits for a reply that is ready.
    if (input_.buffered() < count) replies_.flush();
    return input_.take(count);
}

void Transmission::run() {
    const auto done = within_memory([&]() -> Result<void> {
        while (const auto bytes = take(request_size(session_.style))) {
            const auto request = parse_request(*bytes, session_.style);
            if (!request || request->command == Command::disconnect || !handle(*request) || output_.broken()) break;
            replies_.flush_if_many();
        }
        replies_.flush();
        return {};
    });
    // Before the crew is waited for, which may be waiting for a turn that these replies have.
    if (!done) replies_.hang_up();
    crew_.finish();
}

std::unique_ptr<Transmission::Tools> Transmission::take_tools() {
    const std::lock_guard lock(tools_mutex_);
    if (tools_.empty()) return std::make_unique<Tools>(*this);
    auto tools = std::move(tools_.back());
    tools_.pop_back();
    return tools;
}

/// Has the crew do the work, for which `bytes` are reserved. If memory runs out, the connection ends.
template <class Work>
void Transmission::give_to_crew(std::uint64_t bytes, Work&& work) {
    crew_.submit(bytes, [this, work = std::forward<Work>(work)]() mutable {
        std::unique_ptr<Tools> tools;
        const auto done = within_memory([&]() -> Result<void> {
            tools = take_tools();
            work(*tools);
            tools->replies.flush();
            const std::lock_guard lock(tools_mutex_);
            tools_.push_back(std::move(tools));
            return {};
        });
        if (!done) tools ? tools->replies.hang_up() : output_.hang_up();
    });
}

bool Transmission::handle(const Request& request) {
    const auto payload = payload_size(request, session_.style);
    // More than any client may send is not worth being received, and nothing can be found behind it.
    if (payload > max_payload) return false;
    if (const auto refusal = refuse(request, session_.style, bounds_)) {
        if (payload > 0) replies_.flush();
        if (!input_.skip(payload)) return false;
        replies_.failed(request, refusal->failure, refusal->why);
        return true;
    }
    if (request.command == Command::write)
        return for_the_crew(request) ? write_elsewhere(request) : write_here(request);

    const auto with_it = take(static_cast<std::size_t>(payload));
    if (!with_it) return false;
    if (!for_the_crew(request)) {
        perform(session_, request, *with_it, known_, pace_of(request), replies_);
        return true;
    }
    const auto bytes = std::min<std::uint64_t>(request.command == Command::read ? request.length : 0, bounds_.chunk);
    replies_.flush();
    crew_.reserve(bytes);
    give_to_crew(bytes, [this, request, data = std::vector(with_it->begin(), with_it->end())](Tools& tools) {
        if (!output_.broken()) perform(session_, request, data, tools.known, pace_of(request), tools.replies);
    });
    return true;
}

/// Straight out of the input's buffer.
bool Transmission::write_here(const Request& request) {
    Result<void> result;
    std::uint64_t at = request.offset;
    const std::uint64_t end = at + request.length;
    while (at < end) {
        const auto whole = request.length <= bounds_.chunk;
        const auto piece = whole ? static_cast<std::size_t>(end - at) : next_piece(at, end - at, bounds_.chunk);
        const auto data = take(piece);
        if (!data) return false;
        if (result) result = pace_of(request).timed(piece, [&] { return disk_.write({at}, *data); });
        at += piece;
    }
    finish_change(session_, request, std::move(result), replies_);
    return true;
}

bool Transmission::write_elsewhere(const Request& request) {
    const auto chunk = bounds_.chunk;
    std::uint64_t at = request.offset;
    const std::uint64_t end = at + request.length;
    const auto pieces = request.length == 0 ? 1 : (end - 1) / chunk - at / chunk + 1;
    const auto write = std::make_shared<SplitWrite>(request, pieces);
    do {
        const auto piece = next_piece(at, end - at, chunk);
        replies_.flush();
        crew_.reserve(piece);
        auto data = std::make_unique_for_overwrite<std::byte[]>(piece);
        if (!input_.take_into({data.get(), piece})) return false;
        give_to_crew(piece, [this, write, at, piece, data = std::move(data)](Tools& tools) {
            auto& pace = pace_of(write->request);
            auto result = pace.timed(piece, [&] { return disk_.write({at}, {data.get(), piece}); });
            if (!write->done(std::move(result))) return;
            finish_change(session_, write->request, std::move(write->result), tools.replies);
        });
        at += piece;
    } while (at < end);
    return true;
}

/// Bytes that the input of a client takes at once.
std::size_t input_bytes(std::span<const NbdExport> exports) {
    std::size_t largest = 0;
    for (const auto& exported : exports) largest = std::max(largest, chunk_bytes(*exported.disk));
    return largest + 64 * KiB;
}

/// What comes behind the greeting.
void serve_greeted(Stream& stream, Input& input, const Greeting& greeting, std::span<const NbdExport> exports,
                   const NbdLimits& limits) {
    const auto session = negotiate(stream, input, greeting, exports);
    if (!session) return;
    stream.wait_forever();
    Transmission(stream, input, *session, limits).run();
}

void serve_without_tls(Stream& stream, std::span<const NbdExport> exports, const NbdLimits& limits) {
    Input input(stream, input_bytes(exports));
    if (const auto greeting = greet(stream, input)) serve_greeted(stream, input, *greeting, exports, limits);
}

void serve_with_tls(Stream& stream, std::span<const NbdExport> exports, const NbdLimits& limits, const Tls& tls) {
    const auto greeting = [&] {
        Input plain(stream, 4 * KiB);
        auto heard = greet(stream, plain);
        if (heard) heard->tls = await_tls(stream, plain);
        return heard;
    }();
    if (!greeting || !greeting->tls) return;
    const auto secure = tls.over(stream);
    if (!secure->shake_hands()) return;
    Input input(*secure, input_bytes(exports));
    serve_greeted(*secure, input, *greeting, exports, limits);
    secure->say_goodbye();
}

}  // namespace

void serve_client(Stream& stream, std::span<const NbdExport> exports, const NbdLimits& limits, const Tls* tls) {
    // Where there is no memory for this client, the others may have all that they need.
    static_cast<void>(within_memory([&]() -> Result<void> {
        if (tls == nullptr) {
            serve_without_tls(stream, exports, limits);
        } else {
            serve_with_tls(stream, exports, limits, *tls);
        }
        return {};
    }));
    stream.shutdown();
}

}  // namespace qcow::nbd
