#include "server/nbd/handshake.h"

#include <algorithm>
#include <array>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"

namespace qcow::nbd {
namespace {

/// What no sensible option exceeds; Input takes this much at once.
constexpr std::size_t max_option = std::size_t{64} << 10;

/// After so many options a client is not going to get anywhere.
constexpr unsigned max_options = 1000;

/// A message that grows.
class Message {
public:
    template <class T>
    Message& number(T value) {
        bytes_.resize(bytes_.size() + sizeof(T));
        store_be<T>(bytes_, bytes_.size() - sizeof(T), value);
        return *this;
    }
    Message& text(std::string_view text) {
        const auto bytes = as_bytes(text);
        bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
        return *this;
    }
    Message& zeros(std::size_t count) {
        bytes_.resize(bytes_.size() + count);
        return *this;
    }
    [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }

private:
    std::vector<std::byte> bytes_;
};

/// Returns false if the client is gone.
bool send_reply(Stream& stream, Option option, OptionReply type, std::span<const std::byte> data = {}) {
    return stream.send(Message()
                           .number<std::uint64_t>(option_reply_magic)
                           .number(static_cast<std::uint32_t>(option))
                           .number(static_cast<std::uint32_t>(type))
                           .number(static_cast<std::uint32_t>(data.size()))
                           .text({reinterpret_cast<const char*>(data.data()), data.size()})
                           .bytes());
}

/// The next option that the client asks for; nothing: it is gone, or does not speak the protocol.
std::optional<OptionHeader> next_option(Input& input) {
    const auto bytes = input.take(OptionHeader::size);
    if (!bytes) return std::nullopt;
    return parse_option(bytes->first<OptionHeader::size>());
}

class Handshake {
public:
    Handshake(Stream& stream, Input& input, const Greeting& greeting, std::span<const NbdExport> exports)
        : stream_(stream), input_(input), greeting_(greeting), exports_(exports) {}

    std::optional<Session> run();

private:
    enum class Next : std::uint8_t { option, transmission, hang_up };

    Next handle(const OptionHeader& header);
    Next export_name(std::span<const std::byte> data);
    Next list(std::span<const std::byte> data);
    Next info(Option option, OptionData data);
    Next agree_on(Option option, Style style, std::span<const std::byte> data);
    Next meta_context(Option option, OptionData data);

    [[nodiscard]] const NbdExport* find(std::string_view name) const;
    void choose(const NbdExport& exported);
    void reply(Option option, OptionReply type, std::span<const std::byte> data = {});
    Next refuse(Option option, OptionReply type, std::string_view why);
    [[nodiscard]] Next sent() const { return gone_ ? Next::hang_up : Next::option; }
    void send(std::span<const std::byte> bytes) { gone_ = gone_ || !stream_.send(bytes); }

    Stream& stream_;
    Input& input_;
    const Greeting& greeting_;
    std::span<const NbdExport> exports_;
    bool gone_ = false;
    Session session_;
    const NbdExport* contexts_of_ = nullptr;  // the export that session_.contexts were asked for
};

std::optional<Session> Handshake::run() {
    for (unsigned options = 0; options < max_options; ++options) {
        const auto header = next_option(input_);
        if (!header) return std::nullopt;
        switch (handle(*header)) {
            case Next::option: break;
            case Next::transmission: return session_;
            case Next::hang_up: return std::nullopt;
        }
    }
    return std::nullopt;
}

Handshake::Next Handshake::handle(const OptionHeader& header) {
    if (header.length > max_option) {
        if (header.option == Option::export_name || !input_.skip(header.length)) return Next::hang_up;
        return refuse(header.option, OptionReply::too_big, "too much data for an option");
    }
    const auto data = input_.take(header.length);
    if (!data) return Next::hang_up;
    switch (header.option) {
        case Option::export_name: return export_name(*data);
        case Option::abort: reply(header.option, OptionReply::ack); return Next::hang_up;
        case Option::list: return list(*data);
        case Option::info:
        case Option::go: return info(header.option, OptionData(*data));
        case Option::structured_reply: return agree_on(header.option, Style::structured, *data);
        case Option::extended_headers: return agree_on(header.option, Style::extended, *data);
        case Option::list_meta_context:
        case Option::set_meta_context: return meta_context(header.option, OptionData(*data));
        case Option::starttls:
            return greeting_.tls ? refuse(header.option, OptionReply::invalid, "TLS has begun already")
                                 : refuse(header.option, OptionReply::policy, "this server has no TLS");
    }
    return refuse(header.option, OptionReply::unsupported, "unknown option");
}

Handshake::Next Handshake::export_name(std::span<const std::byte> data) {
    const auto* exported = find({reinterpret_cast<const char*>(data.data()), data.size()});
    // This option has no way to say no.
    if (exported == nullptr) return Next::hang_up;
    choose(*exported);
    Message message;
    message.number<std::uint64_t>(exported->disk->size()).number(transmission_flags(*exported, session_.style));
    if (!greeting_.no_zeroes) message.zeros(124);
    send(message.bytes());
    return gone_ ? Next::hang_up : Next::transmission;
}

Handshake::Next Handshake::list(std::span<const std::byte> data) {
    if (!data.empty()) return refuse(Option::list, OptionReply::invalid, "the option takes no data");
    for (const auto& exported : exports_) {
        reply(Option::list, OptionReply::server,
              Message()
                  .number(static_cast<std::uint32_t>(exported.name.size()))
                  .text(exported.name)
                  .text(exported.description)
                  .bytes());
    }
    reply(Option::list, OptionReply::ack);
    return sent();
}

Handshake::Next Handshake::info(Option option, OptionData data) {
    const auto name = data.string();
    const auto count = data.number<std::uint16_t>();
    if (!name || !count) return refuse(option, OptionReply::invalid, "malformed data");
    bool wants_name = false;
    bool wants_description = false;
    for (unsigned i = 0; i < *count; ++i) {
        const auto wanted = data.number<std::uint16_t>();
        if (!wanted) return refuse(option, OptionReply::invalid, "malformed data");
        wants_name |= *wanted == static_cast<std::uint16_t>(Info::name);
        wants_description |= *wanted == static_cast<std::uint16_t>(Info::description);
    }
    if (!data.empty()) return refuse(option, OptionReply::invalid, "malformed data");
    const auto* exported = find(*name);
    if (exported == nullptr) return refuse(option, OptionReply::unknown, "there is no export of that name");

    const auto tell = [&](Info info, auto&& fill) {
        Message message;
        message.number(static_cast<std::uint16_t>(info));
        fill(message);
        reply(option, OptionReply::info, message.bytes());
    };
    if (wants_name) tell(Info::name, [&](Message& message) { message.text(exported->name); });
    if (wants_description && !exported->description.empty())
        tell(Info::description, [&](Message& message) { message.text(exported->description); });
    tell(Info::block_size, [&](Message& message) {
        const auto preferred = std::clamp(exported->disk->block_size(), 4 * KiB, max_payload);
        message.number<std::uint32_t>(1)
            .number(static_cast<std::uint32_t>(preferred))
            .number(static_cast<std::uint32_t>(max_payload));
    });
    tell(Info::export_info, [&](Message& message) {
        message.number<std::uint64_t>(exported->disk->size()).number(transmission_flags(*exported, session_.style));
    });
    reply(option, OptionReply::ack);
    if (gone_ || option == Option::info) return sent();
    choose(*exported);
    return Next::transmission;
}

Handshake::Next Handshake::agree_on(Option option, Style style, std::span<const std::byte> data) {
    if (!data.empty()) return refuse(option, OptionReply::invalid, "the option takes no data");
    if (session_.style > style)
        return refuse(option, OptionReply::extended_headers_required, "extended headers have been agreed on");
    session_.style = style;
    reply(option, OptionReply::ack);
    return sent();
}

Handshake::Next Handshake::meta_context(Option option, OptionData data) {
    const bool set = option == Option::set_meta_context;
    if (set) {
        session_.contexts.clear();
        contexts_of_ = nullptr;
    }
    if (session_.style == Style::simple)
        return refuse(option, OptionReply::invalid, "structured replies must be agreed on first");
    const auto name = data.string();
    const auto count = data.number<std::uint32_t>();
    std::vector<std::string_view> queries;
    for (std::uint32_t i = 0; count && i < *count; ++i) {
        const auto query = data.string();
        if (!query) return refuse(option, OptionReply::invalid, "malformed data");
        queries.push_back(*query);
    }
    if (!name || !count || !data.empty()) return refuse(option, OptionReply::invalid, "malformed data");
    const auto* exported = find(*name);
    if (exported == nullptr) return refuse(option, OptionReply::unknown, "there is no export of that name");

    // To list, a query may be the front of a name that ends in a colon, and no query at all asks for everything.
    const auto matches = [&](const std::string& context, std::string_view query) {
        return query == context || (!set && query.ends_with(':') && context.starts_with(query));
    };
    for (const auto& context : exported->contexts) {
        const bool wanted = (!set && queries.empty()) ||
                            std::ranges::any_of(queries, [&](auto query) { return matches(context.name, query); });
        if (!wanted) continue;
        const auto id = set ? static_cast<std::uint32_t>(session_.contexts.size()) : 0;
        if (set) session_.contexts.push_back(&context);
        reply(option, OptionReply::meta_context, Message().number<std::uint32_t>(id).text(context.name).bytes());
    }
    if (set) contexts_of_ = exported;
    reply(option, OptionReply::ack);
    return sent();
}

const NbdExport* Handshake::find(std::string_view name) const {
    const auto found = std::ranges::find(exports_, name, &NbdExport::name);
    if (found != exports_.end()) return &*found;
    return name.empty() ? &exports_.front() : nullptr;
}

void Handshake::choose(const NbdExport& exported) {
    session_.exported = &exported;
    if (contexts_of_ != &exported) session_.contexts.clear();
}

void Handshake::reply(Option option, OptionReply type, std::span<const std::byte> data) {
    gone_ = gone_ || !send_reply(stream_, option, type, data);
}

Handshake::Next Handshake::refuse(Option option, OptionReply type, std::string_view why) {
    reply(option, type, as_bytes(why));
    return sent();
}

}  // namespace

std::uint16_t transmission_flags(const NbdExport& exported, Style style) {
    namespace flag = transmission_flag;
    // A flush reaches what was written on every connection: they all write to one disk.
    std::uint16_t flags = flag::has_flags | flag::send_flush | flag::send_fua | flag::can_multi_conn | flag::send_cache;
    if (exported.read_only) {
        flags |= flag::read_only;
    } else {
        flags |= flag::send_trim | flag::send_write_zeroes | flag::send_fast_zero;
    }
    if (style != Style::simple) flags |= flag::send_df;
    if (style == Style::extended) flags |= flag::block_status_payload;
    return flags;
}

std::optional<Greeting> greet(Stream& stream, Input& input) {
    const bool sent = stream.send(Message()
                                      .number<std::uint64_t>(init_magic)
                                      .number<std::uint64_t>(option_magic)
                                      .number<std::uint16_t>(handshake_fixed_newstyle | handshake_no_zeroes)
                                      .bytes());
    const auto client = sent ? input.take(4) : std::nullopt;
    if (!client) return std::nullopt;
    const auto flags = load_be<std::uint32_t>(*client, 0);
    if ((flags & ~(handshake_fixed_newstyle | handshake_no_zeroes)) != 0) return std::nullopt;
    return Greeting{.no_zeroes = (flags & handshake_no_zeroes) != 0};
}

bool await_tls(Stream& stream, Input& input) {
    for (unsigned options = 0; options < max_options; ++options) {
        const auto header = next_option(input);
        // EXPORT_NAME has no way to say no.
        if (!header || header->option == Option::export_name || !input.skip(header->length)) return false;
        const auto reply = [&](OptionReply type, std::string_view why = {}) {
            return send_reply(stream, header->option, type, as_bytes(why));
        };
        if (header->option == Option::starttls && header->length == 0) {
            // What lies behind it has not come through TLS, and must not be taken as if it had.
            return input.buffered() == 0 && reply(OptionReply::ack);
        }
        if (header->option == Option::abort) {
            reply(OptionReply::ack);
            return false;
        }
        const bool sent = header->option == Option::starttls
                              ? reply(OptionReply::invalid, "the option takes no data")
                              : reply(OptionReply::tls_required, "this server is for clients with TLS only");
        if (!sent) return false;
    }
    return false;
}

std::optional<Session> negotiate(Stream& stream, Input& input, const Greeting& greeting,
                                 std::span<const NbdExport> exports) {
    return Handshake(stream, input, greeting, exports).run();
}

}  // namespace qcow::nbd
