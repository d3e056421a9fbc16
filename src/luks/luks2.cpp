#include "luks/luks2.h"

#include <fmt/format.h>
#include <libcryptsetup.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "base/loaded_library.h"
#include "base/try.h"
#include "crypto/kdf.h"
#include "format/luks.h"
#include "luks/volume.h"
#include "qcow/text.h"

namespace qcow::luks {
namespace {

using Json = nlohmann::json;

constexpr std::uint64_t min_header_bytes = 16 * KiB;  // of one of its two copies
constexpr std::uint64_t max_header_bytes = 4 * MiB;
constexpr std::uint64_t max_material_bytes = 128 * MiB;
constexpr std::uint64_t max_copied_bytes = 2 * max_header_bytes + max_material_bytes;
constexpr unsigned key_slots = 32;
constexpr std::uint64_t most_key_bytes = 1024;
constexpr std::uint64_t most_counted = 0xffffffff;  // libcryptsetup has 32 bits for it
/// Of memory that Argon2 passes over, by one processor. The slowest machines of today do as much.
constexpr double argon2_bytes_per_second = 500e6;

// Whoever opens the file adds its name.
std::unexpected<Error> corrupt(std::string_view what) {
    return fail(Errc::corrupt, "LUKS2 header", fmt::format("it is damaged: {}", what));
}
std::unexpected<Error> unsupported(std::string what) {
    return fail(Errc::unsupported, "LUKS2 header", std::move(what));
}

/// The functions of libcryptsetup. It is loaded when it is needed: it takes several other libraries with it.
struct Library {
    decltype(&crypt_init) init = nullptr;
    decltype(&crypt_free) free = nullptr;
    decltype(&crypt_set_log_callback) set_log_callback = nullptr;
    decltype(&crypt_load) load = nullptr;
    decltype(&crypt_dump_json) dump_json = nullptr;
    decltype(&crypt_get_volume_key_size) volume_key_size = nullptr;
    decltype(&crypt_volume_key_get) volume_key_get = nullptr;
    std::string error;  // empty: all are there
};

Library load_library() {
    Library result;
    LoadedLibrary library(QCOW_CRYPTSETUP_LIBRARY);
    library.find(result.init, "crypt_init");
    library.find(result.free, "crypt_free");
    library.find(result.set_log_callback, "crypt_set_log_callback");
    library.find(result.load, "crypt_load");
    library.find(result.dump_json, "crypt_dump_json");
    library.find(result.volume_key_size, "crypt_get_volume_key_size");
    library.find(result.volume_key_get, "crypt_volume_key_get");
    result.error = library.error();
    return result;
}

Result<const Library*> library() {
    static const Library loaded = load_library();
    if (loaded.error.empty()) return &loaded;
    return fail(Errc::unsupported, "libcryptsetup",
                fmt::format("it cannot be loaded ({}); LUKS2 needs it (Debian: libcryptsetup12)", loaded.error));
}

/// A file in memory, with the parts of another one that are copied.
class Copy {
public:
    static Result<std::unique_ptr<Copy>> make(const Storage& file) {
        const int fd = memfd_create("luks2", MFD_CLOEXEC);
        if (fd < 0) return system_failure();
        std::unique_ptr<Copy> copy(new Copy(file, fd));
        // As long as the file, without taking memory for it. If that was cut, it is for us to say so.
        const auto length = std::max<std::uint64_t>(TRY(file.size()), max_copied_bytes);
        if (ftruncate(fd, static_cast<off_t>(length)) != 0) return system_failure();
        return copy;
    }
    Copy(const Copy&) = delete;
    Copy& operator=(const Copy&) = delete;
    ~Copy() { close(fd_); }

    Result<void> add(HostOffset at, std::uint64_t length) {
        std::vector<std::byte> bytes(length);
        const auto there = TRY(file_.read(at, bytes));
        for (std::size_t done = 0; done < there;) {
            const auto written = pwrite(fd_, bytes.data() + done, there - done, static_cast<off_t>(at.value + done));
            if (written < 0 && errno != EINTR) return system_failure();
            done += static_cast<std::size_t>(std::max<ssize_t>(written, 0));
        }
        return {};
    }

    [[nodiscard]] std::string path() const { return fmt::format("/proc/self/fd/{}", fd_); }

private:
    Copy(const Storage& file, int fd) : file_(file), fd_(fd) {}

    static std::unexpected<Error> system_failure() {
        return fail(Errc::no_memory, "LUKS2 header",
                    fmt::format("a copy of it in memory: {}", std::generic_category().message(errno)));
    }

    const Storage& file_;
    const int fd_;
};

/// Whether a copy of the header has the bytes that its checksum is about. Source: the LUKS2 on-disk format
/// specification, version 1.1.2, section 2.1.
Result<bool> has_right_checksum(const Storage& file, HostOffset at, std::uint64_t length) {
    constexpr std::size_t algorithm_at = 72;
    constexpr std::size_t algorithm_bytes = 32;
    constexpr std::size_t checksum_at = 448;
    constexpr std::size_t checksum_bytes = 64;
    std::vector<std::byte> header(length);
    TRY(file.read(at, header));
    std::string algorithm(reinterpret_cast<const char*>(header.data()) + algorithm_at, algorithm_bytes);
    algorithm.resize(std::min(algorithm.find('\0'), algorithm.size()));
    const auto size = crypto::hash_size(algorithm);
    if (!size || *size > checksum_bytes) return false;
    const auto field = std::span(header).subspan(checksum_at, checksum_bytes);
    const std::vector<std::byte> recorded(field.begin(), field.begin() + static_cast<std::ptrdiff_t>(*size));
    std::ranges::fill(field, std::byte{0});
    std::vector<std::byte> computed(*size);
    TRY_VOID(crypto::digest(algorithm, header, computed));
    return computed == recorded;
}

/// An opened header.
class Header {
public:
    static Result<std::unique_ptr<Header>> read(const Storage& file) {
        const auto* const functions = TRY(library());
        std::array<std::byte, 16> start = {};
        TRY(file.read({0}, start));
        const auto bytes = load_be<std::uint64_t>(start, 8);
        if (bytes < min_header_bytes || bytes > max_header_bytes)
            return corrupt(fmt::format("it would have {} bytes", bytes));
        if (const auto there = TRY(file.size()); there < 2 * bytes) {
            return corrupt(
                fmt::format("the file has {} bytes, and the two copies of the header take {}", there, 2 * bytes));
        }
        auto copy = TRY(Copy::make(file));
        TRY_VOID(copy->add({0}, 2 * bytes));
        std::unique_ptr<Header> header(new Header(file, *functions, std::move(copy)));
        if (auto loaded = header->load(); !loaded) {
            if (!TRY(has_right_checksum(file, {0}, bytes)) && !TRY(has_right_checksum(file, {bytes}, bytes)))
                return corrupt("the checksums of both copies of the header are wrong");
            return std::unexpected(std::move(loaded).error());
        }
        return header;
        // NOLINTNEXTLINE(clang-analyzer-cplusplus.NewDeleteLeaks): it does not see that the header owns the copy
    }
    Header(const Header&) = delete;
    Header& operator=(const Header&) = delete;
    ~Header() {
        if (device_ != nullptr) functions_.free(device_);
    }

    [[nodiscard]] Result<Luks2> layout() const {
        return parsed([&]() -> Result<Luks2> {
            TRY_VOID(verify_requirements());
            const auto& segment = TRY(data_segment());
            Luks2 result;
            result.info.method = "luks2";
            result.info.cipher = segment.at("encryption");
            result.info.slots = key_slots;
            for (const auto& [name, slot] : json_.at("keyslots").items()) {
                result.info.used_slots.push_back(static_cast<unsigned>(number(name)));
                result.info.key_bits = static_cast<unsigned>(count(slot, "key_size", most_key_bytes) * 8);
                const auto& kdf = slot.at("kdf");
                result.info.hash = kdf.contains("hash") ? kdf.at("hash") : kdf.at("type");
            }
            result.data = {number(segment.at("offset"))};
            if (segment.at("size") != "dynamic") result.bytes = number(segment.at("size"));
            result.sector_bytes = segment.at("sector_size");
            result.first_sector = number(segment.at("iv_tweak"));
            const auto sector = result.sector_bytes;
            if (sector != 512 && sector != 1024 && sector != 2048 && sector != 4096)
                return corrupt(fmt::format("sectors of {} bytes", sector));
            return result;
        });
    }

    [[nodiscard]] Result<double> key_seconds() const {
        double seconds = 0;
        TRY_VOID(parsed([&]() -> Result<void> {
            seconds = TRY(work());
            return {};
        }));
        return seconds;
    }

    [[nodiscard]] Result<std::shared_ptr<const crypto::SectorCipher>> unlock(const Secret& key, double max_seconds) {
        const auto layout = TRY(this->layout());
        TRY_VOID(verify_work(file_, TRY(key_seconds()), max_seconds));
        TRY_VOID(parsed([&] { return copy_key_materials(); }));
        const int key_bytes = functions_.volume_key_size(device_);
        if (key_bytes <= 0) return corrupt("its key has no length");
        Secret data_key(static_cast<std::size_t>(key_bytes));
        std::size_t length = data_key.bytes().size();
        const auto slot =
            functions_.volume_key_get(device_, CRYPT_ANY_SLOT, reinterpret_cast<char*>(data_key.bytes().data()),
                                      &length, reinterpret_cast<const char*>(key.bytes().data()), key.bytes().size());
        if (slot == -ENOMEM) return fail(Errc::no_memory, file_.name(), "too little memory to derive its key");
        if (slot == -EPERM) {
            return fail(Errc::encrypted, file_.name(), wrong_key_text(layout.info.used_slots.size(), key));
        }
        if (slot < 0) return fail(Errc::encrypted, file_.name(), reason("its key cannot be had", slot));
        const auto& text = layout.info.cipher;
        const auto dash = std::min(text.find('-'), text.size());
        return crypto::SectorCipher::make(text.substr(0, dash), text.substr(std::min(dash + 1, text.size())),
                                          std::as_const(data_key).bytes().first(length), layout.sector_bytes);
    }

private:
    Header(const Storage& file, const Library& functions, std::unique_ptr<Copy> copy)
        : file_(file), functions_(functions), copy_(std::move(copy)) {}

    /// What it says about errors goes into ours.
    static void log(int level, const char* message, void* header) {
        if (level == CRYPT_LOG_ERROR) static_cast<Header*>(header)->said_ = message;
    }

    Result<void> load() {
        if (const int done = functions_.init(&device_, copy_->path().c_str()); done < 0)
            return fail(Errc::io, "LUKS2 header", reason("libcryptsetup does not take a copy of it", done));
        functions_.set_log_callback(device_, log, this);
        if (const int done = functions_.load(device_, CRYPT_LUKS2, nullptr); done < 0)
            return corrupt(reason("libcryptsetup does not accept it", done));
        const char* text = nullptr;
        if (const int done = functions_.dump_json(device_, &text, 0); done < 0)
            return corrupt(reason("it has no metadata", done));
        json_ = Json::parse(text, nullptr, false);
        return json_.is_object() ? Result<void>() : corrupt("its metadata are no JSON");
    }

    [[nodiscard]] std::string reason(std::string_view what, int error) const {
        auto said = printable(said_.substr(0, said_.find_last_not_of(".\n") + 1));
        if (said.empty()) said = std::generic_category().message(-error);
        return fmt::format("{} ({})", what, said);
    }

    /// Metadata may hold anything.
    template <class Parse>
    auto parsed(const Parse& parse) const -> decltype(parse()) {
        try {
            return parse();
        } catch (const Json::exception& error) {
            const std::string_view text = error.what();
            return corrupt(printable(text.substr(text.find(' ') + 1)));  // after "[json.exception.TYPE.NUMBER]"
        }
    }

    /// 64-bit numbers are texts in the metadata.
    static std::uint64_t number(const std::string& text) {
        std::uint64_t value = 0;
        const auto* const end = text.data() + text.size();
        if (std::from_chars(text.data(), end, value).ptr != end || text.empty())
            throw Json::other_error::create(0, fmt::format("\"{}\" is no number", printable(text)), nullptr);
        return value;
    }

    /// A number that libcryptsetup will work with: neither negative, nor longer than it has bits for.
    static std::uint64_t count(const Json& object, const char* name, std::uint64_t most = most_counted) {
        const auto& value = object.at(name);
        if (value.is_number_unsigned() && value.get<std::uint64_t>() <= most) return value.get<std::uint64_t>();
        throw Json::other_error::create(
            0, fmt::format("\"{}\" is {}, and no number from 0 to {}", name, printable(value.dump(), 32), most),
            nullptr);
    }

    Result<void> verify_requirements() const {
        const auto& config = json_.at("config");
        if (!config.contains("requirements") || !config.at("requirements").contains("mandatory")) return {};
        for (const std::string name : config.at("requirements").at("mandatory")) {
            if (name.starts_with("online-reencrypt") || name.starts_with("offline-reencrypt"))
                return unsupported("the volume is being reencrypted; finish that with cryptsetup reencrypt first");
            return unsupported(fmt::format("it requires \"{}\", which is not supported", printable(name)));
        }
        return {};
    }

    Result<Json> data_segment() const {
        const auto& segments = json_.at("segments");
        if (segments.size() != 1) return unsupported("the data are in several segments; one is supported");
        const auto& segment = *segments.begin();
        if (segment.at("type") != "crypt") {
            return unsupported(fmt::format("a segment has the type \"{}\"; crypt is supported",
                                           printable(segment.at("type").get<std::string>())));
        }
        if (segment.contains("integrity"))
            return unsupported("the volume has integrity data (dm-integrity), which are not supported");
        return segment;
    }

    [[nodiscard]] Result<double> work() const {
        double of_digests = 0;
        for (const auto& digest : json_.at("digests")) of_digests += TRY(pbkdf2_seconds(digest, 1));
        const auto memory = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
        double seconds = 0;
        for (const auto& slot : json_.at("keyslots")) {
            const auto& kdf = slot.at("kdf");
            seconds += of_digests;
            // libcryptsetup takes as much memory as these numbers say.
            count(slot, "key_size", most_key_bytes);
            if (count(slot.at("af"), "stripes") != format::luks_stripes)
                return unsupported(fmt::format("key material in other than {} stripes", format::luks_stripes));
            const auto area_key_bytes = count(slot.at("area"), "key_size", most_key_bytes);
            if (kdf.at("type") == "pbkdf2") {
                seconds += TRY(pbkdf2_seconds(kdf, area_key_bytes));
                continue;
            }
            count(kdf, "cpus");
            const double bytes = static_cast<double>(count(kdf, "memory")) * 1024;
            if (bytes > memory / 2) {
                return fail(Errc::limit_exceeded, file_.name(),
                            fmt::format("its LUKS2 header asks for {:.0f} MiB of memory to try the key, and this "
                                        "machine allows {:.0f} MiB, half of its memory",
                                        bytes / MiB, memory / 2 / MiB));
            }
            seconds += static_cast<double>(count(kdf, "time")) * bytes / argon2_bytes_per_second;
        }
        return seconds;
    }

    static Result<double> pbkdf2_seconds(const Json& kdf, std::uint64_t key_bytes) {
        const std::string hash = kdf.at("hash");
        const auto blocks = divide_up(key_bytes, TRY(crypto::hash_size(hash)));
        return static_cast<double>(count(kdf, "iterations")) * static_cast<double>(blocks) /
               TRY(crypto::pbkdf2_speed(hash));
    }

    Result<void> copy_key_materials() {
        std::uint64_t left = max_material_bytes;
        for (const auto& slot : json_.at("keyslots")) {
            const auto& area = slot.at("area");
            const auto bytes = number(area.at("size"));
            if (bytes > left) return corrupt("its key slots are too large");
            left -= bytes;
            TRY_VOID(copy_->add({number(area.at("offset"))}, bytes));
        }
        return {};
    }

    const Storage& file_;
    const Library& functions_;
    const std::unique_ptr<Copy> copy_;
    crypt_device* device_ = nullptr;
    Json json_;
    std::string said_;
};

}  // namespace

Result<Luks2> read_luks2(const Storage& file) { return TRY(Header::read(file))->layout(); }

Result<double> luks2_key_seconds(const Storage& file) { return TRY(Header::read(file))->key_seconds(); }

Result<std::shared_ptr<const crypto::SectorCipher>> unlock_luks2(const Storage& file, const Secret& key,
                                                                 double max_seconds) {
    return TRY(Header::read(file))->unlock(key, max_seconds);
}

}  // namespace qcow::luks
