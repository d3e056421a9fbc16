// qcow info: shows the properties of an image.

#include <fmt/format.h>

#include "command.h"
#include "describe.h"
#include "inside.h"
#include "text.h"

namespace tool {
namespace {

struct InfoOptions {
    Source source;
    bool chain = false;
    bool usage = false;
    bool json = false;
};

/// What is in the disk; nothing where it cannot be read, for example because it is encrypted.
std::optional<qcow::PartitionTable> contents_of(const std::shared_ptr<qcow::Image>& image, const InfoOptions& options,
                                                bool followed) {
    auto whole = image;
    if (!followed && (!image->info() || image->info()->backing || image->info()->data_file)) {
        const auto spec = spec_of(options.source);
        if (!spec) return {};
        whole = qcow::open_image(*spec).value_or(nullptr);
    }
    if (!whole) return {};
    auto table = qcow::list_partitions(*whole);
    if (!table || (table->partitions.empty() && table->content.type.empty())) return {};
    return *std::move(table);
}

qcow::Result<int> run(const InfoOptions& options) {
    const bool follow = options.chain || options.usage;
    auto image = open_source(options.source, follow);
    // If the chain cannot be opened, the image alone is still worth printing.
    std::optional<qcow::Error> broken_chain;
    if (!image && follow) {
        broken_chain = std::move(image).error();
        image = open_source(options.source, false);
    }
    if (!image) return std::unexpected(broken_chain ? std::move(*broken_chain) : std::move(image).error());

    Json json = Json::array();
    std::uint64_t cluster_size = 0;
    for (auto layer = *image; layer; layer = options.chain ? layer->backing() : nullptr) {
        auto info = layer->info();
        if (!info) return std::unexpected(std::move(info).error());
        for (const auto& warning : warnings_of(*info)) complain("warning: " + warning);
        if (layer == *image) cluster_size = info->cluster_size;
        const auto contents = layer == *image ? contents_of(layer, options, follow && !broken_chain) : std::nullopt;
        if (options.json) {
            json.push_back(info_json(*info));
            if (contents) json.back()["contents"] = partitions_json(*contents);
        } else {
            if (layer != *image) fmt::print("\n");
            print_info(*info);
            if (contents) print_contents(*contents);
        }
    }
    if (options.usage && !broken_chain) {
        const auto usage = qcow::measure_usage(**image);
        if (!usage) return std::unexpected(usage.error());
        // Only images with metadata have unused space, and only checks that work can tell how much.
        const auto report = (*image)->check({});
        if (options.json) {
            json[0]["usage"] = usage_json(*usage, cluster_size);
            if (report) json[0]["usage"]["compact-bytes"] = report->compact_bytes;
        } else {
            fmt::print("\n");
            print_usage(*usage, cluster_size);
            if (report && report->compact_bytes > 0)
                fmt::print("qcow compact would make the file at least {} shorter\n", human(report->compact_bytes));
        }
    }
    if (options.json) print_json(options.chain ? json : json[0]);
    if (broken_chain) return std::unexpected(std::move(*broken_chain));
    return ok;
}

}  // namespace

void declare_info(CLI::App& root, int& status) {
    const auto options = std::make_shared<InfoOptions>();
    auto& app = declare(
        root, status, "info", "Show the format, sizes, features, snapshots and backing file of an image",
        "Reads the header and its tables, and of the disk only what tells its partitions and file systems. --usage\n"
        "reads the mapping, too.\n"
        "Examples:\n"
        "  qcow info disk.qcow2\n"
        "  qcow info --backing-chain overlay.qcow2    all images of the chain\n"
        "  qcow info --usage disk.qcow2               how much each layer stores",
        [options] { return run(*options); });
    add_source_options(app, options->source);
    options->source.examines = true;
    app.add_flag("--backing-chain", options->chain, "Show all images of the backing chain, the topmost first");
    app.add_flag("--usage", options->usage, "Show the data, compressed and zero bytes and the fragments of each layer");
    add_output_options(app, options->json, "Print a JSON object, or with --backing-chain an array");
}

}  // namespace tool
