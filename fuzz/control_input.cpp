// A client of the control socket that says anything at all.

#include <array>
#include <nlohmann/json.hpp>
#include <string>

#include "base/bits.h"
#include "fuzz/inputs.h"
#include "fuzz/require.h"
#include "qcow/bitmaps.h"
#include "qcow/check.h"
#include "qcow/control.h"
#include "qcow/create.h"

namespace qcow::fuzz {
namespace {

/// A disk is grown to this at most: bitmaps take memory and time for each byte of it.
constexpr std::uint64_t max_size = 64 * MiB;

std::shared_ptr<Image> new_image() {
    const auto storage = memory_storage();
    QCOW_REQUIRE(create_image({storage, nullptr}, {.size = MiB, .cluster_size = 4 * KiB}).has_value());
    auto image = open_image(storage, {.writable = true, .format = Format::qcow2});
    QCOW_REQUIRE(image.has_value());
    QCOW_REQUIRE((*image)->write({8 * KiB}, std::array<std::byte, 512>{std::byte{1}}).has_value());
    QCOW_REQUIRE((*image)->snapshots().create("old").has_value());
    QCOW_REQUIRE((*image)->change_bitmaps(std::array{BitmapAction{.bitmap = "bits"}}).has_value());
    return *std::move(image);
}

bool makes_a_large_disk(const std::string& command) {
    const auto json = nlohmann::json::parse(command, nullptr, false);
    if (!json.is_object() || !json.contains("arguments") || !json["arguments"].is_object()) return false;
    const auto size = json["arguments"].find("size");
    return size != json["arguments"].end() && size->is_number_unsigned() && size->get<std::uint64_t>() > max_size;
}

}  // namespace

void run_control_input(std::span<const std::byte> input) {
    const auto image = new_image();
    bool stopped = false;
    Control control({{"a", image}, {"b", new_image()}}, [&] { stopped = true; });
    std::string_view rest(reinterpret_cast<const char*>(input.data()), input.size());
    for (int i = 0; i < 64 && !rest.empty() && !stopped; ++i) {
        const auto end = std::min(rest.find('\n'), rest.size());
        const std::string command(rest.substr(0, end));
        rest.remove_prefix(std::min(end + 1, rest.size()));
        if (makes_a_large_disk(command)) continue;
        const auto text = control.execute(command);
        QCOW_REQUIRE(text.find('\n') == std::string::npos);
        const auto answer = nlohmann::json::parse(text, nullptr, false);
        QCOW_REQUIRE(answer.is_object() && answer.contains("return") != answer.contains("error"));
        std::array<std::byte, 512> sector;
        QCOW_REQUIRE(image->size() < 16 * KiB || image->read({8 * KiB}, sector).has_value());
    }
    const auto report = image->check({.workers = 1});
    QCOW_REQUIRE(report.has_value() && report->clean());
    QCOW_REQUIRE(image->close().has_value());
}

}  // namespace qcow::fuzz
