// The commands of Control.

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/within_memory.h"
#include "qcow/bitmaps.h"
#include "qcow/control.h"
#include "qcow/text.h"

namespace qcow {
namespace {

using Json = nlohmann::ordered_json;
using Kind = BitmapAction::Kind;

/// Deeper values are refused: to print or free one takes stack for each level.
constexpr int max_depth = 16;

constexpr std::string_view bitmap_prefix = "block-dirty-bitmap-";

std::unexpected<Error> refuse(std::string what) { return fail(Errc::invalid_argument, "", std::move(what)); }

std::string text_of(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

Result<Json> parse(std::string_view text) {
    if (text.size() > Control::max_command)
        return refuse(fmt::format("a command has at most {} bytes", Control::max_command));
    bool too_deep = false;
    std::vector<std::set<std::string>> keys;  // of each object that is being read
    std::optional<std::string> twice;
    auto json = Json::parse(
        text,
        [&](int depth, Json::parse_event_t event, Json& value) {
            too_deep |= depth > max_depth;
            if (event == Json::parse_event_t::object_start) keys.emplace_back();
            if (event == Json::parse_event_t::object_end && !keys.empty()) keys.pop_back();
            if (event == Json::parse_event_t::key && !keys.empty() &&
                !keys.back().insert(value.get<std::string>()).second)
                twice = value.get<std::string>();
            return depth <= max_depth;
        },
        false);
    if (too_deep) return refuse(fmt::format("values have at most {} levels", max_depth));
    if (twice) return refuse(fmt::format("the key \"{}\" is there twice", printable(*twice, 64)));
    if (!json.is_object())
        return refuse("a command is a JSON object on one line, such as {\"execute\": \"query-commands\"}");
    return json;
}

/// The arguments of a command. Each is asked for by its name; end() refuses the others.
class Arguments {
public:
    static Result<Arguments> of(const Json& command, const char* key) {
        const auto found = command.find(key);
        if (found == command.end()) return Arguments(Json::object());
        if (!found->is_object()) return refuse(fmt::format("\"{}\" must be an object", key));
        return Arguments(*found);
    }

    Result<std::optional<std::string>> optional_text(const char* name) {
        return optional<std::string>(name, &Json::is_string, "a string");
    }
    Result<std::optional<std::uint64_t>> optional_number(const char* name) {
        return optional<std::uint64_t>(name, &Json::is_number_unsigned, "a whole number, not negative");
    }
    Result<bool> flag(const char* name, bool otherwise = false) {
        return TRY(optional<bool>(name, &Json::is_boolean, "true or false")).value_or(otherwise);
    }
    Result<std::string> text(const char* name) { return required(name, TRY(optional_text(name))); }
    Result<std::uint64_t> number(const char* name) { return required(name, TRY(optional_number(name))); }
    Result<Json> array(const char* name) { return required(name, TRY(optional<Json>(name, &Json::is_array, "an array"))); }

    [[nodiscard]] Result<void> end() const {
        if (rest_.empty()) return {};
        return refuse(fmt::format("there is no argument \"{}\"", printable(rest_.begin().key())));
    }

private:
    explicit Arguments(Json object) : rest_(std::move(object)) {}

    template <class Value, class Is>
    Result<std::optional<Value>> optional(const char* name, Is is, std::string_view wanted) {
        const auto found = rest_.find(name);
        if (found == rest_.end()) return std::nullopt;
        if (!((*found).*is)()) return refuse(fmt::format("argument \"{}\" must be {}", name, wanted));
        auto value = found->get<Value>();
        rest_.erase(name);
        return value;
    }

    template <class Value>
    static Result<Value> required(const char* name, std::optional<Value> value) {
        if (value) return *std::move(value);
        return refuse(fmt::format("argument \"{}\" is missing", name));
    }

    Json rest_;
};

Json snapshot_json(const SnapshotInfo& snapshot) {
    constexpr std::uint64_t second = 1'000'000'000;
    Json json = {{"id", snapshot.id},
                 {"name", snapshot.name},
                 {"vm-state-size", snapshot.vm_state_bytes},
                 {"date-sec", snapshot.date_seconds},
                 {"date-nsec", snapshot.date_nanoseconds},
                 {"vm-clock-sec", snapshot.vm_clock_nanoseconds / second},
                 {"vm-clock-nsec", snapshot.vm_clock_nanoseconds % second},
                 {"virtual-size", snapshot.virtual_size}};
    if (snapshot.icount) json["icount"] = *snapshot.icount;
    return json;
}

Result<Json> image_json(const ControlledImage& controlled) {
    const auto info = TRY(controlled.image->info());
    Json snapshots = Json::array();
    for (const auto& snapshot : info.snapshots) snapshots.push_back(snapshot_json(snapshot));
    Json bitmaps = Json::array();
    for (const auto& bitmap : info.bitmaps) {
        bitmaps.push_back({{"name", bitmap.name},
                           {"granularity", bitmap.granularity},
                           {"recording", bitmap.enabled},
                           {"inconsistent", bitmap.in_use && !bitmap.enabled},
                           {"persistent", true}});
    }
    Json image = {{"filename", info.filename},
                  {"format", format_name(info.format)},
                  {"virtual-size", controlled.image->size()},
                  {"actual-size", info.disk_size}};
    if (info.cluster_size != 0) image["cluster-size"] = info.cluster_size;
    if (info.backing) image["backing-filename"] = info.backing->name;
    image["snapshots"] = std::move(snapshots);
    return Json{{"node-name", controlled.name}, {"file", info.filename},     {"drv", format_name(info.format)},
                {"ro", controlled.read_only},   {"image", std::move(image)}, {"dirty-bitmaps", std::move(bitmaps)}};
}

}  // namespace

class Control::Commands {
public:
    Commands(std::vector<ControlledImage> images, std::function<void()> quit, std::function<void()> after_command)
        : images_(std::move(images)), quit_(std::move(quit)), after_command_(std::move(after_command)) {}

    std::string answer(std::string_view text) {
        Json answer;
        auto done = within_memory([&] { return run(text, answer); });
        if (after_command_) after_command_();
        if (done) {
            answer["return"] = *std::move(done);
        } else {
            const auto& error = done.error();
            answer["error"] = {{"class", unknown_command_ ? "CommandNotFound" : "GenericError"},
                               {"desc", error.message()}};
        }
        return text_of(answer);
    }

    std::mutex mutex_;

private:
    using Run = Result<Json> (Commands::*)(Arguments&);
    struct Command {
        std::string_view name;
        Run run;
    };

    Result<Json> run(std::string_view text, Json& answer) {
        unknown_command_ = false;
        const auto command = TRY(parse(text));
        if (const auto id = command.find("id"); id != command.end()) answer["id"] = *id;
        const auto name = command.find("execute");
        if (name == command.end() || !name->is_string())
            return refuse("\"execute\", the name of the command, is missing");
        for (const auto& [key, value] : command.items()) {
            if (key != "execute" && key != "arguments" && key != "id")
                return refuse(fmt::format("there is no member \"{}\" of a command", printable(key)));
        }
        auto arguments = TRY(Arguments::of(command, "arguments"));
        return execute(name->get<std::string>(), arguments);
    }

    Result<Json> execute(const std::string& name, Arguments& arguments) {
        if (kind_of(name)) {
            auto [image, actions] = TRY(bitmap_actions(name, arguments));
            TRY_VOID(image->change_bitmaps(actions));
            return Json::object();
        }
        const auto found = std::ranges::find(commands, name, &Command::name);
        if (found == std::end(commands) || (name == "quit" && !quit_)) {
            unknown_command_ = true;
            return refuse(fmt::format("there is no command \"{}\"; query-commands lists all", printable(name)));
        }
        return (this->*found->run)(arguments);
    }

    /// The image that the arguments name. A single image need not be named.
    Result<const ControlledImage*> named_image(const std::optional<std::string>& name) const {
        if (!name && images_.size() == 1) return &images_.front();
        std::vector<std::string> names;
        for (const auto& image : images_) {
            if (image.name == name) return &image;
            names.push_back('"' + printable(image.name) + '"');
        }
        const auto all = fmt::format("{}", fmt::join(names, ", "));
        if (!name) return refuse(fmt::format("argument \"node-name\" is missing; the images are {}", all));
        return refuse(fmt::format("there is no image \"{}\"; the images are {}", printable(*name), all));
    }

    /// QMP has three words for it.
    Result<std::shared_ptr<Image>> image(Arguments& arguments) const {
        std::optional<std::string> name;
        for (const auto* word : {"node-name", "node", "device"}) {
            auto given = TRY(arguments.optional_text(word));
            if (given && name) return refuse("the image is named twice");
            if (given) name = std::move(given);
        }
        return TRY(named_image(name))->image;
    }

    // ---- Bitmaps ----

    static std::optional<Kind> kind_of(std::string_view command) {
        constexpr std::pair<std::string_view, Kind> kinds[] = {{"add", Kind::add},         {"remove", Kind::remove},
                                                               {"clear", Kind::clear},     {"enable", Kind::enable},
                                                               {"disable", Kind::disable}, {"merge", Kind::merge}};
        if (!command.starts_with(bitmap_prefix)) return std::nullopt;
        for (const auto& [name, kind] : kinds) {
            if (command.substr(bitmap_prefix.size()) == name) return kind;
        }
        return std::nullopt;
    }

    struct BitmapChange {
        std::shared_ptr<Image> image;
        std::vector<BitmapAction> actions;
    };

    [[nodiscard]] Result<BitmapChange> bitmap_actions(std::string_view command, Arguments& arguments) const {
        BitmapChange change{TRY(image(arguments)), {}};
        const auto kind = *kind_of(command);
        if (kind == Kind::merge) {
            const auto target = TRY(arguments.text("target"));
            for (const auto& source : TRY(arguments.array("bitmaps")))
                change.actions.push_back(TRY(merge(target, source, change.image)));
        } else {
            BitmapAction action{.kind = kind, .bitmap = TRY(arguments.text("name"))};
            bool disabled = false;
            if (kind == Kind::add) {
                action.granularity = TRY(arguments.optional_number("granularity")).value_or(0);
                disabled = TRY(arguments.flag("disabled"));
                if (!TRY(arguments.flag("persistent", true)))
                    return refuse("a bitmap that is not persistent cannot be added; leave out \"persistent\"");
            }
            change.actions.push_back(action);
            if (disabled) change.actions.push_back({.kind = Kind::disable, .bitmap = action.bitmap});
        }
        TRY_VOID(arguments.end());
        return change;
    }

    /// The source is a name, or an object that also names an image.
    [[nodiscard]] Result<BitmapAction> merge(const std::string& target, const Json& source,
                                             const std::shared_ptr<Image>& image) const {
        BitmapAction action{.kind = Kind::merge, .bitmap = target};
        if (source.is_string()) {
            action.source = source.get<std::string>();
            return action;
        }
        const Json wrapped = {{"bitmap", source}};
        auto arguments = TRY(Arguments::of(wrapped, "bitmap"));
        action.source = TRY(arguments.text("name"));
        action.source_image = TRY(this->image(arguments));
        if (action.source_image == image) action.source_image = nullptr;
        TRY_VOID(arguments.end());
        return action;
    }

    /// Several actions on the bitmaps of one image, which take effect together.
    Result<Json> transaction(Arguments& arguments) {
        BitmapChange all;
        for (const auto& action : TRY(arguments.array("actions"))) {
            const auto type = action.is_object() ? action.find("type") : action.end();
            if (!action.is_object() || type == action.end() || !type->is_string())
                return refuse("an action is an object with \"type\" and \"data\"");
            if (!kind_of(type->get<std::string>())) {
                return refuse(fmt::format("\"{}\" cannot be part of a transaction; the actions on bitmaps can",
                                          printable(type->get<std::string>())));
            }
            auto data = TRY(Arguments::of(action, "data"));
            auto change = TRY(bitmap_actions(type->get<std::string>(), data));
            if (all.image && all.image != change.image) return refuse("a transaction is about one image");
            all.image = std::move(change.image);
            std::ranges::move(change.actions, std::back_inserter(all.actions));
        }
        TRY_VOID(arguments.end());
        if (all.image) TRY_VOID(all.image->change_bitmaps(all.actions));
        return Json::object();
    }

    // ---- Snapshots ----

    Result<Json> create_snapshot(Arguments& arguments) {
        const auto image = TRY(this->image(arguments));
        const auto name = TRY(arguments.text("name"));
        TRY_VOID(arguments.end());
        // A client that got no answer asks again: one snapshot is enough.
        for (const auto& snapshot : TRY(image->snapshots().list())) {
            if (snapshot.name == name)
                return refuse(fmt::format("a snapshot with the name \"{}\" exists", printable(name, 256)));
        }
        return snapshot_json(TRY(image->snapshots().create(name)));
    }

    /// The snapshot that "id" or "name" says; both: that has both.
    static Result<SnapshotInfo> find_snapshot(Image& image, Arguments& arguments) {
        const auto id = TRY(arguments.optional_text("id"));
        const auto name = TRY(arguments.optional_text("name"));
        if (!id && !name) return refuse("argument \"id\" or \"name\" is missing");
        std::optional<SnapshotInfo> found;
        for (auto& snapshot : TRY(image.snapshots().list())) {
            if ((id && snapshot.id != *id) || (name && snapshot.name != *name)) continue;
            if (found) return refuse("two snapshots have this name; give an \"id\"");
            found = std::move(snapshot);
        }
        if (found) return *std::move(found);
        return fail(Errc::not_found, "", fmt::format("there is no snapshot \"{}\"", printable(id ? *id : *name)));
    }

    Result<Json> remove_snapshot(Arguments& arguments) {
        const auto image = TRY(this->image(arguments));
        const auto snapshot = TRY(find_snapshot(*image, arguments));
        TRY_VOID(arguments.end());
        TRY_VOID(image->snapshots().remove(snapshot.id));
        return snapshot_json(snapshot);
    }

    Result<Json> apply_snapshot(Arguments& arguments) {
        const auto image = TRY(this->image(arguments));
        const auto snapshot = TRY(find_snapshot(*image, arguments));
        TRY_VOID(arguments.end());
        TRY_VOID(image->snapshots().apply(snapshot.id));
        return Json::object();
    }

    Result<Json> rename_snapshot(Arguments& arguments) {
        const auto image = TRY(this->image(arguments));
        const auto new_name = TRY(arguments.text("new-name"));
        const auto snapshot = TRY(find_snapshot(*image, arguments));
        TRY_VOID(arguments.end());
        TRY_VOID(image->snapshots().rename(snapshot.id, new_name));
        return Json::object();
    }

    // ---- The disk ----

    Result<Json> resize(Arguments& arguments) {
        const auto image = TRY(this->image(arguments));
        const auto size = TRY(arguments.number("size"));
        const auto shrink = TRY(arguments.flag("shrink"));
        TRY_VOID(arguments.end());
        if (size < image->size() && !shrink) {
            return refuse(fmt::format("the disk has {} bytes; shrinking it loses data, and needs \"shrink\": true",
                                      image->size()));
        }
        TRY_VOID(image->resize(size, shrink ? Image::Shrink::allow : Image::Shrink::refuse));
        return Json::object();
    }

    Result<Json> flush(Arguments& arguments) {
        const auto image = TRY(this->image(arguments));
        TRY_VOID(arguments.end());
        TRY_VOID(image->flush());
        return Json::object();
    }

    // ---- The server ----

    Result<Json> query_images(Arguments& arguments) {
        TRY_VOID(arguments.end());
        Json all = Json::array();
        for (const auto& image : images_) all.push_back(TRY(image_json(image)));
        return all;
    }

    Result<Json> query_commands(Arguments& arguments) {
        TRY_VOID(arguments.end());
        Json all = Json::array();
        for (const auto& command : commands) {
            if (command.name != "quit" || quit_) all.push_back({{"name", command.name}});
        }
        for (const auto* name : {"add", "remove", "clear", "enable", "disable", "merge"})
            all.push_back({{"name", fmt::format("{}{}", bitmap_prefix, name)}});
        return all;
    }

    Result<Json> nothing(Arguments& arguments) {
        TRY(arguments.optional_number("enable"));
        return Json::object();
    }

    Result<Json> quit(Arguments& arguments) {
        TRY_VOID(arguments.end());
        quit_();
        return Json::object();
    }

    static constexpr Command commands[] = {
        {"qmp_capabilities", &Commands::nothing},
        {"query-commands", &Commands::query_commands},
        {"query-named-block-nodes", &Commands::query_images},
        {"blockdev-snapshot-internal-sync", &Commands::create_snapshot},
        {"blockdev-snapshot-delete-internal-sync", &Commands::remove_snapshot},
        {"blockdev-snapshot-apply-internal-sync", &Commands::apply_snapshot},
        {"blockdev-snapshot-rename-internal-sync", &Commands::rename_snapshot},
        {"transaction", &Commands::transaction},
        {"block_resize", &Commands::resize},
        {"flush", &Commands::flush},
        {"quit", &Commands::quit},
    };

    const std::vector<ControlledImage> images_;
    const std::function<void()> quit_;
    const std::function<void()> after_command_;
    bool unknown_command_ = false;
};

Control::Control(std::vector<ControlledImage> images, std::function<void()> quit, std::function<void()> after_command)
    : commands_(std::make_unique<Commands>(std::move(images), std::move(quit), std::move(after_command))) {}

Control::~Control() = default;

std::string Control::greeting() {
    return text_of({{"QMP", {{"version", {{"qcowkit", "1"}}}, {"capabilities", Json::array()}}}});
}

std::string Control::execute(std::string_view command) {
    const std::lock_guard lock(commands_->mutex_);
    return commands_->answer(command);
}

}  // namespace qcow
