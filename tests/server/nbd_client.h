#pragma once
// An NBD client that says exactly what a test wants it to say, right or wrong.

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "server/nbd/protocol.h"

namespace qcow::test {

using Bytes = std::vector<std::byte>;

/// Numbers in the protocol's order, and texts.
class Wire {
public:
    template <std::unsigned_integral T>
    Wire& operator<<(T value) {
        bytes.resize(bytes.size() + sizeof(T));
        store_be<T>(bytes, bytes.size() - sizeof(T), value);
        return *this;
    }
    Wire& operator<<(std::span<const std::byte> more) {
        bytes.insert(bytes.end(), more.begin(), more.end());
        return *this;
    }
    Wire& operator<<(std::string_view text) { return *this << as_bytes(text); }
    Bytes bytes;
};

Bytes with_length(std::string_view text);

/// The peer has closed the connection.
struct Closed : std::runtime_error {
    Closed() : std::runtime_error("the server closed the connection") {}
};

class NbdClient {
public:
    explicit NbdClient(const std::string& path);
    NbdClient(const NbdClient&) = delete;
    NbdClient& operator=(const NbdClient&) = delete;
    virtual ~NbdClient() { hang_up(); }

    void hang_up();

    virtual void send(std::span<const std::byte> bytes) const;
    void send(const Wire& wire) const { send(wire.bytes); }

    /// As much as the server takes within a while of silence.
    std::size_t send_until_stuck(std::span<const std::byte> bytes) const;

    [[nodiscard]] virtual Bytes receive(std::size_t count) const;

    template <class T>
    T number() {
        return load_be<T>(receive(sizeof(T)), 0);
    }

    /// Whether the server hangs up, after whatever it still sends.
    bool is_closed() const;

    // The handshake.

    void greet(std::uint32_t flags = 3);

    struct Reply {
        nbd::OptionReply type = {};
        Bytes data;
        [[nodiscard]] std::string text() const { return {reinterpret_cast<const char*>(data.data()), data.size()}; }
    };

    void send_option(nbd::Option option, std::span<const std::byte> data = {});

    Reply option_reply(nbd::Option option);

    /// All replies to an option; the last is an acknowledgement or an error.
    std::vector<Reply> ask(nbd::Option option, std::span<const std::byte> data = {});

    /// The last of them.
    nbd::OptionReply outcome(nbd::Option option, std::span<const std::byte> data = {});

    static Bytes go_data(std::string_view name) { return (Wire() << with_length(name) << std::uint16_t{0}).bytes; }

    static Bytes query_data(std::string_view name, const std::vector<std::string>& queries);

    /// From the greeting to the transmission.
    void go(nbd::Style style, const std::vector<std::string>& contexts = {}, std::string_view name = "");

    /// From behind the greeting.
    void negotiate(nbd::Style style, const std::vector<std::string>& contexts = {}, std::string_view name = "");

    // The transmission.

    [[nodiscard]] Wire request(nbd::Command command, std::uint64_t offset, std::uint64_t length,
                               std::uint16_t flags = 0, std::uint64_t cookie = 1) const;

    struct Chunk {
        std::uint16_t type = 0;
        bool done = false;
        std::uint64_t cookie = 0;
        std::uint32_t error = 0;  ///< of simple replies and error chunks
        Bytes data;               ///< without the number of an error
    };

    /// `simple_data`: bytes behind a simple reply that says success.
    Chunk chunk(std::size_t simple_data = 0);

    /// One request without data in the reply; the error, 0 for none.
    std::uint32_t command(nbd::Command command, std::uint64_t offset, std::uint64_t length, std::uint16_t flags = 0,
                          std::span<const std::byte> payload = {});

    std::uint32_t write(std::uint64_t offset, std::span<const std::byte> bytes, std::uint16_t flags = 0);

    struct Read {
        std::uint32_t error = 0;
        Bytes bytes;
        unsigned data_chunks = 0;
        unsigned holes = 0;
    };

    /// A whole read; bytes that no chunk covers are 0xee.
    Read read(std::uint64_t offset, std::size_t length, std::uint16_t flags = 0);

protected:
    int fd_;  ///< what it says goes here

private:
    void must_ack(nbd::Option option, std::span<const std::byte> data) {
        if (outcome(option, data) != nbd::OptionReply::ack) throw std::runtime_error("an option was refused");
    }

    nbd::Style style_ = nbd::Style::simple;
};

}  // namespace qcow::test
