#include "luks/volume.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <optional>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/try.h"
#include "crypto/kdf.h"
#include "format/luks.h"
#include "qcow/text.h"

namespace qcow::luks {
namespace {

using crypto::SectorCipher;
using format::Luks1Header;
using format::LuksSlot;

constexpr std::uint64_t alignment = 4096;  // of key materials, and of the data
constexpr std::uint32_t min_iterations = 1000;
constexpr std::uint64_t digest_share = 8;  // of iter_time_ms, for the digest of the key

std::unexpected<Error> bad_option(std::string_view name, std::string what) {
    return fail(Errc::invalid_argument, fmt::format("option encrypt.{}", name), std::move(what));
}

Result<void> verify_new_key(const Secret& key, std::uint32_t iter_time_ms) {
    if (key.bytes().empty())
        return bad_option("key-secret", "the new key is empty, so that anybody could open the image");
    if (iter_time_ms == 0) return bad_option("iter-time", "it is at least 1 millisecond");
    return {};
}

Result<Luks1Header> read_header(const Area& area) {
    std::vector<std::byte> bytes(format::luks1_header_bytes);
    const auto there = TRY(area.file.read(area.at, bytes));
    auto header = format::parse_luks1_header(std::span(bytes).first(there));
    if (!header) return std::unexpected(std::move(header).error().in(area.file.name()));
    const std::uint64_t file_bytes = TRY(area.file.size());
    const auto in_file = file_bytes - std::min(file_bytes, area.at.value);
    if (auto sound = format::verify_luks1(*header, std::min(area.bytes, in_file)); !sound)
        return std::unexpected(std::move(sound).error().in(area.file.name()));
    return header;
}

/// PBKDF2 makes each so many bytes of a key for itself.
Result<std::uint64_t> blocks_of(const std::string& hash, std::uint64_t key_bytes) {
    return divide_up(key_bytes, TRY(crypto::hash_size(hash)));
}

Result<double> work_of(const Luks1Header& header) {
    const auto blocks = TRY(blocks_of(header.hash, header.key_bytes));
    const auto digest_blocks = TRY(blocks_of(header.hash, header.digest.size()));
    double iterations = 0;
    for (const auto& slot : header.slots) {
        if (!slot.used) continue;
        iterations += static_cast<double>(slot.iterations) * static_cast<double>(blocks);
        iterations += static_cast<double>(header.iterations) * static_cast<double>(digest_blocks);
    }
    return iterations / TRY(crypto::pbkdf2_speed(header.hash));
}

/// The cipher that hides the key material of a slot.
Result<std::shared_ptr<const SectorCipher>> cipher_of_slot(const Luks1Header& header, const LuksSlot& slot,
                                                           const Secret& key) {
    Secret derived(header.key_bytes);
    TRY_VOID(crypto::pbkdf2(header.hash, key.bytes(), slot.salt, slot.iterations, derived.bytes()));
    return SectorCipher::make(header.cipher, header.mode, derived.bytes());
}

std::uint64_t stored_material_bytes(const Luks1Header& header) {
    return divide_up(header.material_bytes(), format::luks_sector_bytes) * format::luks_sector_bytes;
}

HostOffset material_at(HostOffset area, const LuksSlot& slot) {
    return area + std::uint64_t{slot.material_sector} * format::luks_sector_bytes;
}

Result<bool> is_key(const Luks1Header& header, const Secret& data_key) {
    std::array<std::byte, std::tuple_size_v<decltype(header.digest)>> digest;
    TRY_VOID(crypto::pbkdf2(header.hash, data_key.bytes(), header.salt, header.iterations, digest));
    return crypto::equal(digest, header.digest);
}

/// Returns the key of the data, if `key` opens the slot.
Result<std::optional<Secret>> open_slot(const Area& area, const Luks1Header& header, const LuksSlot& slot,
                                        const Secret& key) {
    Secret material(stored_material_bytes(header));
    if (TRY(area.file.read(material_at(area.at, slot), material.bytes())) != material.bytes().size())
        return fail(Errc::corrupt, area.file.name(), "the file ends within the key material of LUKS");
    TRY(cipher_of_slot(header, slot, key))->decrypt(0, material.bytes());
    Secret data_key(header.key_bytes);
    TRY_VOID(crypto::merge(header.hash, material.bytes().first(header.material_bytes()), data_key.bytes()));
    if (!TRY(is_key(header, data_key))) return std::nullopt;
    return data_key;
}

struct Opened {
    std::size_t slot = 0;
    Secret data_key;
};

/// What is wrong with the states of the slots; nothing: some are in use.
std::optional<std::string> flaw_of_slots(const Luks1Header& header) {
    const bool any = std::ranges::any_of(header.slots, &LuksSlot::used);
    const auto odd = std::ranges::find(header.slots, false, &LuksSlot::marked);
    if (any && odd == header.slots.end()) return std::nullopt;
    std::string flaw = any ? "" : "no key slot is in use: nobody can read its data any more";
    if (odd != header.slots.end()) {
        flaw += fmt::format("{}key slot {} is damaged: it is marked neither as used nor as unused", any ? "" : "; ",
                            odd - header.slots.begin());
    }
    return flaw;
}

std::unexpected<Error> wrong_key(const Area& area, const Luks1Header& header, const Secret& key) {
    const auto used = static_cast<std::size_t>(std::ranges::count(header.slots, true, &LuksSlot::used));
    const auto flaw = flaw_of_slots(header);
    auto why = used == 0 ? *flaw : wrong_key_text(used, key);
    if (used != 0 && flaw) why += "; " + *flaw;
    return fail(Errc::encrypted, area.file.name(), std::move(why));
}

Result<Opened> open_any_slot(const Area& area, const Luks1Header& header, const Secret& key, double max_seconds) {
    TRY_VOID(verify_work(area.file, TRY(work_of(header)), max_seconds));
    for (std::size_t i = 0; i < header.slots.size(); ++i) {
        if (!header.slots[i].used) continue;
        if (auto data_key = TRY(open_slot(area, header, header.slots[i], key))) return Opened{i, *std::move(data_key)};
    }
    return wrong_key(area, header, key);
}

/// Returns the iterations that take this time.
Result<std::uint32_t> iterations_for(const std::string& hash, std::uint64_t key_bytes, double milliseconds) {
    const auto blocks = TRY(blocks_of(hash, key_bytes));
    const double iterations = TRY(crypto::pbkdf2_speed(hash)) * milliseconds / 1000 / static_cast<double>(blocks);
    constexpr double most = std::numeric_limits<std::int32_t>::max();  // of what implementations accept
    return static_cast<std::uint32_t>(std::clamp<double>(iterations, min_iterations, most));
}

/// Fills a slot. Returns its key material as it is stored.
Result<std::vector<std::byte>> fill_slot(const Luks1Header& header, LuksSlot& slot, const Secret& data_key,
                                         const Secret& key, std::uint32_t iter_time_ms) {
    slot.used = true;
    slot.stripes = format::luks_stripes;
    slot.iterations = TRY(iterations_for(header.hash, header.key_bytes, iter_time_ms));
    crypto::fill_random(slot.salt);
    std::vector<std::byte> material(stored_material_bytes(header));
    TRY_VOID(crypto::split(header.hash, data_key.bytes(), std::span(material).first(header.material_bytes())));
    TRY(cipher_of_slot(header, slot, key))->encrypt(0, material);
    return material;
}

/// A random UUID of version 4.
std::string make_uuid() {
    std::array<std::byte, 16> bytes;
    crypto::fill_random(bytes);
    bytes[6] = (bytes[6] & std::byte{0x0f}) | std::byte{0x40};
    bytes[8] = (bytes[8] & std::byte{0x3f}) | std::byte{0x80};
    std::string text;
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
        text += fmt::format("{:02x}", static_cast<unsigned>(bytes[i]));
    }
    return text;
}

/// The header that these options ask for, without keys.
Result<Luks1Header> plan(const EncryptionOptions& options) {
    Luks1Header header;
    const auto dash = options.cipher.find('-');
    unsigned bits = 0;
    if (dash != std::string::npos) {
        const char* const end = options.cipher.data() + options.cipher.size();
        if (std::from_chars(options.cipher.data() + dash + 1, end, bits).ptr != end) bits = 0;
    }
    if (bits == 0 || bits % 8 != 0 || bits > 512)
        return bad_option("cipher-alg", fmt::format("\"{}\" is no cipher, such as aes-256", printable(options.cipher)));
    header.cipher = options.cipher.substr(0, dash);
    header.key_bytes = bits / 8 * (options.cipher_mode == "xts" ? 2 : 1);
    if (options.ivgen != "essiv" && !options.ivgen_hash.empty())
        return bad_option("ivgen-hash-alg", "only ivgen-alg=essiv has a hash");
    if (options.cipher_mode == "ecb" && options.ivgen == "essiv")
        return bad_option("ivgen-alg", "ecb uses no vectors; leave the option out");
    header.mode = fmt::format("{}-{}", options.cipher_mode, options.ivgen);
    if (options.ivgen == "essiv") header.mode += ":" + (options.ivgen_hash.empty() ? "sha256" : options.ivgen_hash);
    header.hash = options.hash;
    TRY(crypto::hash_size(header.hash));
    // Whether there is such a cipher: before anything is written.
    const std::vector<std::byte> sample(header.key_bytes);
    TRY(SectorCipher::make(header.cipher, header.mode, sample));
    std::uint64_t sector = alignment / format::luks_sector_bytes;
    for (auto& slot : header.slots) {
        slot.material_sector = static_cast<std::uint32_t>(sector);
        sector += divide_up(header.material_bytes(), alignment) * alignment / format::luks_sector_bytes;
    }
    header.payload_sector = static_cast<std::uint32_t>(sector);
    return header;
}

/// Overwrites the key material of an unused slot.
Result<void> overwrite_material(Storage& file, HostOffset at, const Luks1Header& header, const LuksSlot& slot) {
    std::vector<std::byte> noise(stored_material_bytes(header));
    crypto::fill_random(noise);
    return file.write(material_at(at, slot), noise);
}

/// Writes the header first: a crash leaves a slot that is not in use, whose key material is worth nothing without its
/// salt. Were it the other way round, a slot could seem to be in use that nothing opens.
Result<void> erase_slot(Storage& file, HostOffset at, Luks1Header& header, std::size_t index) {
    auto& slot = header.slots[index];
    slot.used = false;
    slot.iterations = 0;
    slot.salt = {};
    TRY_VOID(file.write(at, format::encode_luks1_header(header)));
    TRY_VOID(file.flush());
    TRY_VOID(overwrite_material(file, at, header, slot));
    return file.flush();
}

/// Overwrites, durably, the key material that interrupted changes left in unused slots.
Result<void> finish_erasing(Storage& file, HostOffset at, const Luks1Header& header) {
    Secret material(stored_material_bytes(header));
    bool changed = false;
    for (const auto& slot : header.slots) {
        if (slot.used || !slot.marked) continue;
        TRY(file.read(material_at(at, slot), material.bytes()));
        if (is_zero(material.bytes())) continue;
        TRY_VOID(overwrite_material(file, at, header, slot));
        changed = true;
    }
    return changed ? file.flush() : Result<void>();
}

/// Fills an unused slot, durably. Its key material comes first, so that a crash leaves it unused.
Result<void> write_slot(Storage& file, HostOffset at, Luks1Header& header, std::size_t index, const Secret& data_key,
                        const KeySlotChange& change) {
    auto slot = header.slots[index];
    const auto material = TRY(fill_slot(header, slot, data_key, *change.new_key, change.iter_time_ms));
    TRY_VOID(file.write(material_at(at, slot), material));
    TRY_VOID(file.flush());
    header.slots[index] = slot;
    TRY_VOID(file.write(at, format::encode_luks1_header(header)));
    return file.flush();
}

Result<void> add_slot(Storage& file, const Area& area, Luks1Header& header, const KeySlotChange& change,
                      const Secret& existing, double max_seconds, const JobControl& control) {
    const auto unused =
        static_cast<std::size_t>(std::ranges::find(header.slots, false, &LuksSlot::used) - header.slots.begin());
    const bool full = unused == header.slots.size();
    if (!change.slot && full) return bad_option("keyslot", "all 8 key slots are in use; erase one");
    const std::size_t index = change.slot.value_or(static_cast<unsigned>(unused));
    const bool replaces = header.slots[index].used;
    if (replaces && !change.force)
        return bad_option("keyslot", fmt::format("key slot {} is in use; --force replaces its passphrase", index));
    if (replaces && full) {
        return bad_option(
            "keyslot",
            "all 8 key slots are in use, and replacing a passphrase needs an unused one meanwhile, so that "
            "it is safe to interrupt; erase one, and add the passphrase then");
    }
    const auto opened = TRY(open_any_slot(area, header, existing, max_seconds));
    TRY_VOID(verify_goes_on(control));
    // The old passphrase goes when the new one opens a slot, and that one stays until the other has it.
    if (replaces) {
        TRY_VOID(write_slot(file, area.at, header, unused, opened.data_key, change));
        TRY_VOID(erase_slot(file, area.at, header, index));
    }
    TRY_VOID(write_slot(file, area.at, header, index, opened.data_key, change));
    return replaces ? erase_slot(file, area.at, header, unused) : Result<void>();
}

Result<void> erase_slots(Storage& file, const Area& area, Luks1Header& header, const KeySlotChange& change,
                         double max_seconds, const JobControl& control) {
    std::vector<std::size_t> doomed;
    if (change.slot) {
        const auto& slot = header.slots[*change.slot];
        if (change.old_key) {
            TRY_VOID(verify_work(area.file, TRY(work_of(header)), max_seconds));
            if (!slot.used || !TRY(open_slot(area, header, slot, *change.old_key)))
                return bad_option("old-secret", fmt::format("it does not open key slot {}", *change.slot));
        }
        doomed.push_back(*change.slot);
    } else if (change.old_key) {
        TRY_VOID(verify_work(area.file, TRY(work_of(header)), max_seconds));
        for (std::size_t i = 0; i < header.slots.size(); ++i) {
            if (header.slots[i].used && TRY(open_slot(area, header, header.slots[i], *change.old_key))) doomed.push_back(i);
        }
        if (doomed.empty()) return wrong_key(area, header, *change.old_key);
    } else {
        return bad_option("state", "inactive needs a key slot (keyslot) or the passphrase to erase (old-secret)");
    }
    const auto opens = [&](std::size_t i) { return header.slots[i].used; };
    const auto used = std::ranges::count(header.slots, true, &LuksSlot::used);
    const auto erased = std::ranges::count_if(doomed, opens);
    if (erased > 0 && erased == used && !change.force) {
        return fail(Errc::invalid_argument, area.file.name(),
                    "these are its last key slots, without which nobody can read its data again; --force erases them");
    }
    TRY_VOID(verify_goes_on(control));
    for (const auto index : doomed) TRY_VOID(erase_slot(file, area.at, header, index));
    return {};
}

}  // namespace

Result<void> verify_work(const Storage& file, double seconds, double max_seconds, double others) {
    if (seconds + others <= max_seconds) return {};
    const auto of_others = others > 0 ? fmt::format(", the images above it for {:.0f}", others) : "";
    return fail(Errc::limit_exceeded, file.name(),
                fmt::format("its LUKS header asks for {:.0f} seconds of work to try the key{}, and {:.0f} are allowed; "
                            "--max-kdf-seconds allows more",
                            seconds, of_others, max_seconds));
}

Result<double> key_seconds(const Area& area) { return work_of(TRY(read_header(area))); }

std::string wrong_key_text(std::size_t slots, const Secret& key) {
    auto text = fmt::format("the key is wrong: it opens none of the {} key slots in use", slots);
    const auto bytes = key.bytes();
    if (!bytes.empty() && bytes.back() == std::byte{'\n'})
        text += "; its last byte is a line feed, which is part of it (printf %s KEY > FILE writes none)";
    return text;
}

Result<std::shared_ptr<const SectorCipher>> unlock(const Area& area, const Secret& key, double max_seconds) {
    const auto header = TRY(read_header(area));
    const auto opened = TRY(open_any_slot(area, header, key, max_seconds));
    return SectorCipher::make(header.cipher, header.mode, opened.data_key.bytes());
}

Result<void> verify_header(const Area& area) {
    const auto header = TRY(read_header(area));
    TRY(crypto::hash_size(header.hash));
    const std::vector<std::byte> sample(header.key_bytes);
    TRY(SectorCipher::make(header.cipher, header.mode, sample));
    if (auto flaw = flaw_of_slots(header)) return fail(Errc::corrupt, area.file.name(), *std::move(flaw));
    return {};
}

Result<std::uint64_t> header_bytes(const EncryptionOptions& options) {
    return std::uint64_t{TRY(plan(options)).payload_sector} * format::luks_sector_bytes;
}

Result<NewHeader> make_header(const EncryptionOptions& options) {
    if (!options.key) return bad_option("key-secret", "the key is missing");
    TRY_VOID(verify_new_key(*options.key, options.iter_time_ms));
    auto header = TRY(plan(options));
    Secret data_key(header.key_bytes);
    crypto::fill_random(data_key.bytes());
    header.uuid = make_uuid();
    crypto::fill_random(header.salt);
    header.iterations = TRY(
        iterations_for(header.hash, header.digest.size(), static_cast<double>(options.iter_time_ms) / digest_share));
    TRY_VOID(crypto::pbkdf2(header.hash, data_key.bytes(), header.salt, header.iterations, header.digest));
    auto& slot = header.slots.front();
    const auto material = TRY(fill_slot(header, slot, data_key, *options.key, options.iter_time_ms));
    NewHeader made;
    made.bytes.resize(std::uint64_t{header.payload_sector} * format::luks_sector_bytes);
    std::ranges::copy(format::encode_luks1_header(header), made.bytes.begin());
    std::ranges::copy(material, std::span(made.bytes).subspan(material_at({0}, slot).value).begin());
    made.cipher = TRY(SectorCipher::make(header.cipher, header.mode, data_key.bytes()));
    return made;
}

Result<void> change_slots(Storage& file, HostOffset at, std::uint64_t bytes, const KeySlotChange& change,
                          const Secret* existing, double max_seconds, const JobControl& control) {
    const Area area{file, at, bytes};
    if (change.new_key) TRY_VOID(verify_new_key(*change.new_key, change.iter_time_ms));
    if (change.new_key && change.old_key) return bad_option("old-secret", "it excludes a new key");
    auto header = TRY(read_header(area));
    if (change.slot && *change.slot >= header.slots.size())
        return bad_option("keyslot", fmt::format("{} is not a number from 0 to 7", *change.slot));
    TRY_VOID(verify_goes_on(control));
    TRY_VOID(finish_erasing(file, at, header));
    if (!change.new_key) return erase_slots(file, area, header, change, max_seconds, control);
    return add_slot(file, area, header, change, *existing, max_seconds, control);
}

Result<std::shared_ptr<const SectorCipher>> legacy_cipher(const Secret& key) {
    Secret padded(16);
    std::ranges::copy(key.bytes().first(std::min(key.bytes().size(), padded.bytes().size())), padded.bytes().begin());
    return SectorCipher::make("aes", "cbc-plain64", padded.bytes());
}

}  // namespace qcow::luks
