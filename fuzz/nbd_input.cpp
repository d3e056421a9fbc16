// A client of the NBD server that says anything at all.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "fuzz/inputs.h"
#include "qcow/image.h"
#include "qcow/serve.h"
#include "server/nbd/connection.h"
#include "server/nbd/session.h"
#include "server/nbd/tls.h"

namespace qcow::fuzz {
namespace {

void require(bool condition) {
    if (!condition) std::abort();
}

/// Gives the input in pieces, and holds what the server sends against the form that it must have.
class InputStream final : public Stream {
public:
    InputStream(std::vector<std::byte> input, std::size_t piece) : input_(std::move(input)), piece_(piece) {}

    std::size_t receive(std::span<std::byte> to) override {
        const auto count = std::min({to.size(), piece_, input_.size() - taken_});
        std::copy_n(input_.begin() + static_cast<std::ptrdiff_t>(taken_), count, to.begin());
        taken_ += count;
        return ended_ ? 0 : count;
    }

    bool send(std::span<const std::byte> bytes) override {
        require(!bytes.empty());
        if (!readable_) return !ended_;
        sent_.insert(sent_.end(), bytes.begin(), bytes.end());
        while (readable_ && take_message()) {
        }
        return !ended_;
    }

    void wait_forever() override {}
    void shutdown() override { ended_ = true; }

    /// Everything that was sent was whole messages.
    void finish() const { require(!readable_ || at_ == sent_.size()); }

private:
    [[nodiscard]] std::size_t left() const { return sent_.size() - at_; }

    template <class T>
    [[nodiscard]] T number(std::size_t offset) const {
        return load_be<T>(sent_, at_ + offset);
    }

    /// Whether a whole message was there.
    bool take_message() {
        const auto take = [&](std::uint64_t length) {
            if (left() < length) return false;
            at_ += length;
            return true;
        };
        if (left() < 4) return false;
        if (at_ == 0) {
            if (left() < 18) return false;
            require(number<std::uint64_t>(0) == nbd::init_magic);
            return take(18);
        }
        switch (number<std::uint32_t>(0)) {
            case 0x0003e889:  // an option's reply
                return left() >= 20 && take(20 + std::uint64_t{number<std::uint32_t>(16)});
            case 0x668e33ef:
                if (left() < 20) return false;
                require(number<std::uint16_t>(4) <= 1 && number<std::uint32_t>(16) <= 300 * KiB);
                return take(20 + number<std::uint32_t>(16));
            case 0x6e8a278c:
                if (left() < 32) return false;
                require(number<std::uint16_t>(4) <= 1 && number<std::uint64_t>(24) <= 300 * KiB);
                return take(32 + number<std::uint64_t>(24));
            default:
                // A simple reply, whose length only its request tells; or what answers EXPORT_NAME.
                readable_ = false;
                return false;
        }
    }

    std::vector<std::byte> input_;
    std::size_t piece_;
    std::size_t taken_ = 0;
    bool ended_ = false;
    std::vector<std::byte> sent_;
    std::size_t at_ = 0;
    bool readable_ = true;
};

/// What a client says to get to the transmission, so that not every input has to find it out.
std::string preamble(unsigned kind) {
    const std::string flags("\0\0\0\3", 4);
    const auto option = [](char number, const std::string& data) {
        return "IHAVEOPT" + std::string("\0\0\0", 3) + number + std::string("\0\0\0", 3) +
               static_cast<char>(data.size()) + data;
    };
    const auto contexts =
        option(10, std::string("\0\0\0\0\0\0\0\2\0\0\0\17base:allocation\0\0\0\25qemu:allocation-depth", 52));
    const auto go = option(7, std::string(6, '\0'));
    switch (kind) {
        case 1: return flags + go;
        case 2: return flags + option(8, "") + contexts + go;
        case 3: return flags + option(11, "") + contexts + go;
        default: return "";
    }
}

/// TLS with a key that no input has; nullptr where it is not built.
const nbd::Tls* tls() {
    static const auto loaded = [] {
        const std::string keys = "name:00112233445566778899aabbccddeeff\n";
        const int fd = memfd_create("keys", MFD_CLOEXEC);
        require(write(fd, keys.data(), keys.size()) == static_cast<ssize_t>(keys.size()));
        auto made = nbd::Tls::load({.psk_file = "/proc/self/fd/" + std::to_string(fd)});
        close(fd);
        return made ? *std::move(made) : nullptr;
    }();
    return loaded.get();
}

}  // namespace

void run_nbd_input(std::span<const std::byte> input) {
    if (input.empty()) return;
    const auto mode = static_cast<unsigned>(input.front());
    const auto storage = memory_storage(std::vector(input.begin(), input.end()));
    require(storage->resize(300'000).has_value());
    auto disk = open_image(storage, {.writable = true, .format = Format::raw});
    require(disk.has_value());
    const bool read_only = (mode & 4) != 0;
    std::vector<NbdExport> exports = {{"", "a description", *disk, read_only, true}, {"other", "", *disk, true}};
    for (auto& exported : exports) exported.contexts = nbd::built_in_contexts(exported);

    auto said = preamble(mode & 3);
    said.append(reinterpret_cast<const char*>(input.data()) + 1, input.size() - 1);
    const auto bytes = as_bytes(said);
    InputStream stream({bytes.begin(), bytes.end()}, std::size_t{1} << (mode >> 3) % 16);
    std::vector<std::byte> before(300'000);
    require((*disk)->read({0}, before).has_value());
    const bool secure = (mode & 128) != 0;
    nbd::serve_client(stream, exports, {.workers = 0}, secure ? tls() : nullptr);
    stream.finish();
    if (!read_only && !(secure && tls() != nullptr)) return;
    std::vector<std::byte> after(before.size());
    require((*disk)->read({0}, after).has_value() && after == before);
}

}  // namespace qcow::fuzz
