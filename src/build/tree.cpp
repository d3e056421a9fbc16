#include "build/tree.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ranges>
#include <set>

#include "base/within_memory.h"
#include "build/file_content.h"
#include "qcow/text.h"

namespace qcow {
namespace {

std::shared_ptr<TreeInode> new_inode(mode_t mode) {
    auto inode = std::make_shared<TreeInode>();
    inode->mode = mode;
    return inode;
}

std::unexpected<Error> refuse(std::string_view path, std::string what) {
    return fail(Errc::invalid_argument, printable(path), std::move(what));
}

constexpr std::string_view whiteout = ".wh.";
constexpr std::string_view opaque = ".wh..wh..opq";

bool is_whiteout(const TreeInode& inode) {
    return S_ISCHR(inode.mode) && (!inode.rare || (inode.rare->major == 0 && inode.rare->minor == 0));
}

/// Takes the attributes of overlayfs from a file, and returns whether it hides what is below it.
Result<bool> take_overlay_attributes(TreeInode& inode, const std::string& name) {
    if (!inode.rare) return false;
    bool hides = false;
    std::string unsupported;
    std::erase_if(inode.rare->xattrs, [&](const auto& xattr) {
        std::string_view key = xattr.first;
        for (const std::string_view prefix : {"trusted.overlay.", "user.overlay."}) {
            if (!key.starts_with(prefix)) continue;
            key.remove_prefix(prefix.size());
            if (key == "opaque" && xattr.second == "y") hides = true;
            if (key == "redirect" || key == "metacopy") unsupported = key;
            return true;
        }
        return false;
    });
    if (!unsupported.empty()) {
        return fail(
            Errc::unsupported, printable(name),
            fmt::format("overlayfs left its contents in a lower layer ({}); copy the merged tree", unsupported));
    }
    return hides;
}

/// Where a symbolic link in a tree leads to, within the tree: the parts of a path. None: to no directory of the tree.
std::optional<std::vector<std::string>> directory_behind(TreeNode& root, std::vector<std::string> path) {
    constexpr unsigned most_links = 40;
    std::vector<std::string> left(path.rbegin(), path.rend());
    std::vector<std::string> done;
    std::vector<TreeNode*> nodes = {&root};
    for (unsigned links = 0; !left.empty();) {
        const auto name = std::move(left.back());
        left.pop_back();
        if (name.empty() || name == ".") continue;
        if (name == "..") {
            if (!done.empty()) done.pop_back();
            if (nodes.size() > 1) nodes.pop_back();
            continue;
        }
        if (!nodes.back()->is_directory()) return {};
        const auto child = nodes.back()->children->find(name);
        if (child == nodes.back()->children->end()) return {};
        const auto& inode = *child->second.inode;
        if (!S_ISLNK(inode.mode)) {
            done.push_back(name);
            nodes.push_back(&child->second);
            continue;
        }
        const std::string_view target = inode.rare ? std::string_view(inode.rare->target) : std::string_view();
        if (++links > most_links || target.empty() || target.size() > longest_path) return {};
        if (target.starts_with('/')) {
            done.clear();
            nodes.resize(1);
        }
        std::vector<std::string> parts;
        for (const auto part : std::views::split(target, '/')) parts.emplace_back(std::string_view(part));
        left.insert(left.end(), parts.rbegin(), parts.rend());
    }
    return nodes.back()->is_directory() ? std::optional(std::move(done)) : std::nullopt;
}

/// Puts a layer over a tree.
class Layering {
public:
    explicit Layering(Tree& lower) : lower_(lower) {}

    Result<void> run(TreeNode& upper) {
        TRY_VOID(put_over(lower_.root(), upper, {}));
        // What lies behind links comes last: it may lie in a directory that the layer changes.
        while (!behind_links_.empty()) {
            const auto [path, node] = std::move(behind_links_.back());
            behind_links_.pop_back();
            const auto whole = fmt::format("{}", fmt::join(path, "/"));
            auto* there = lower_.find(whole);
            if (there == nullptr || !there->is_directory())
                return refuse(whole, "the layer removes it, and puts files into it by a link");
            TRY_VOID(put_over(*there, *node, path));
        }
        return {};
    }

private:
    /// `path` is the one of both.
    Result<void> put_over(TreeNode& lower, TreeNode& upper, const std::vector<std::string>& path) {
        if (upper.children->contains(opaque)) lower.children->clear();
        for (auto& [name, node] : *upper.children) {
            if (name == opaque) continue;
            if (name.starts_with(whiteout)) {
                lower.children->erase(name.substr(whiteout.size()));
            } else if (is_whiteout(*node.inode)) {
                lower.children->erase(name);
            }
        }
        for (auto& [name, node] : *upper.children) {
            if (name.starts_with(whiteout) || is_whiteout(*node.inode)) continue;
            const bool hides = TRY(take_overlay_attributes(*node.inode, name));
            auto& place = (*lower.children)[name];
            if (!node.is_directory()) {
                place = std::move(node);
                continue;
            }
            auto below = path;
            below.push_back(name);
            if (node.implied && place.inode && S_ISLNK(place.inode->mode)) {
                if (auto behind = directory_behind(lower_.root(), below)) {
                    behind_links_.emplace_back(*std::move(behind), &node);
                    continue;
                }
            }
            if (hides || !place.is_directory()) place = new_directory();
            if (!node.implied) {
                place.inode = node.inode;
                place.implied = false;
            }
            TRY_VOID(put_over(place, node, below));
        }
        return {};
    }

    Tree& lower_;
    std::vector<std::pair<std::vector<std::string>, TreeNode*>> behind_links_;
};

Result<void> set_attributes(TreeInode& inode, const FileSpec& file) {
    if (file.mode) inode.mode = (inode.mode & S_IFMT) | *file.mode;
    if (file.uid) inode.uid = *file.uid;
    if (file.gid) inode.gid = *file.gid;
    if (file.mtime) {
        inode.mtime = *file.mtime;
        inode.nanoseconds = 0;
    }
    return {};
}

/// Bytes that the specification holds.
class TextContent final : public Contents {
public:
    explicit TextContent(std::string text) : text_(std::move(text)) {}
    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        std::memcpy(to.data(), text_.data() + at, to.size());
        return {};
    }

private:
    std::string text_;
};

}  // namespace

Result<void> apply_file(Tree& tree, const FileSpec& file) {
    using enum FileSpec::Kind;
    if (TRY(parts_of_path(file.path)).empty()) {
        if (file.kind != change && file.kind != directory) return refuse(file.path, "is the root directory");
        return set_attributes(*tree.root().inode, file);
    }
    if (file.kind == remove) {
        if (tree.remove(file.path)) return {};
        return refuse(file.path, "is to be removed, and no source has it");
    }
    if (file.kind == change) {
        auto* node = tree.find(file.path);
        if (node == nullptr)
            return refuse(file.path, "no source has it; a new file needs a type, a content, a source or a target");
        return set_attributes(*node->inode, file);
    }
    auto& node = *TRY(tree.place(file.path));
    if (file.kind == directory) {
        if (!node.is_directory()) node = new_directory();
        return set_attributes(*node.inode, file);
    }
    if (file.kind == hardlink) {
        const auto* target = tree.find(file.target);
        if (target == nullptr || target->is_directory() || !target->inode)
            return refuse(file.path, fmt::format("{} is no file that a hard link can lead to", printable(file.target)));
        node.children.reset();
        node.inode = target->inode;
        return set_attributes(*node.inode, file);
    }
    node.children.reset();
    const auto make = [&](mode_t type, mode_t permissions) { node.inode = new_inode(type | permissions); };
    switch (file.kind) {
        case symlink:
            make(S_IFLNK, 0777);
            node.inode->make_rare().target = file.target;
            break;
        case character_device: make(S_IFCHR, 0644); break;
        case block_device: make(S_IFBLK, 0644); break;
        case fifo: make(S_IFIFO, 0644); break;
        case socket: make(S_IFSOCK, 0644); break;
        default: make(S_IFREG, 0644); break;
    }
    if (file.kind == character_device || file.kind == block_device) {
        node.inode->make_rare().major = file.major;
        node.inode->make_rare().minor = file.minor;
    }
    if (!file.source.empty()) {
        auto mode = node.inode->mode;
        TRY_VOID(fill_from_file(*node.inode, file.source));
        node.inode->mode = mode;
    } else if (!file.content.empty()) {
        node.inode->size = file.content.size();
        node.inode->content = std::make_unique<TextContent>(file.content);
    }
    return set_attributes(*node.inode, file);
}

namespace {

void visit_inodes(TreeNode& node, std::set<const TreeInode*>& linked, const std::function<void(TreeInode&)>& visit) {
    // Most inodes have a single name, and need not be remembered.
    if (node.inode.use_count() == 1 || linked.insert(node.inode.get()).second) visit(*node.inode);
    if (!node.is_directory()) return;
    for (auto& [name, child] : *node.children) visit_inodes(child, linked, visit);
}

}  // namespace

TreeNode new_directory() { return {new_inode(S_IFDIR | 0755), std::make_unique<Children>()}; }

Result<std::vector<std::string_view>> parts_of_path(std::string_view path) {
    std::vector<std::string_view> parts;
    if (path.size() > longest_path) return refuse(path.substr(0, 64), "the path is longer than 4095 bytes");
    const auto whole = path;
    while (!path.empty()) {
        const auto length = std::min(path.find('/'), path.size());
        const auto part = path.substr(0, length);
        path.remove_prefix(std::min(length + 1, path.size()));
        if (part.empty() || part == ".") continue;
        if (part == "..")
            return fail(Errc::refused_by_policy, printable(whole), "a path with \"..\" may lead out of the tree");
        if (part.size() > longest_name) return refuse(whole, "a name in it is longer than 255 bytes");
        parts.push_back(part);
    }
    if (parts.size() > deepest_directory) return refuse(whole.substr(0, 64), "it lies deeper than 1000 directories");
    return parts;
}

TreeNode* Tree::find(std::string_view path) {
    const auto parts = parts_of_path(path);
    if (!parts) return nullptr;
    auto* node = &root_;
    for (const auto part : *parts) {
        if (!node->is_directory()) return nullptr;
        const auto child = node->children->find(part);
        if (child == node->children->end()) return nullptr;
        node = &child->second;
    }
    return node;
}

Result<TreeNode*> Tree::place(std::string_view path) {
    auto* node = &root_;
    for (const auto part : TRY(parts_of_path(path))) {
        if (!node->inode) {
            *node = new_directory();
            node->implied = true;
        }
        if (!node->is_directory())
            return refuse(path, "the path leads through a file that is no directory; symbolic links are not followed");
        node = &(*node->children)[std::string(part)];
    }
    return node;
}

bool Tree::remove(std::string_view path) {
    const auto parts = parts_of_path(path);
    if (!parts || parts->empty()) return false;
    auto* node = &root_;
    for (const auto part : std::span(*parts).first(parts->size() - 1)) {
        if (!node->is_directory()) return false;
        const auto child = node->children->find(part);
        if (child == node->children->end()) return false;
        node = &child->second;
    }
    return node->is_directory() && node->children->erase(std::string(parts->back())) != 0;
}

void Tree::each_inode(const std::function<void(TreeInode&)>& visit) {
    std::set<const TreeInode*> linked;
    visit_inodes(root_, linked, visit);
}

Result<void> put_layer(Tree& lower, Tree upper) {
    const bool hides = TRY(take_overlay_attributes(*upper.root().inode, "/"));
    if (!upper.root().implied) lower.root().inode = upper.root().inode;
    if (hides) lower.root().children->clear();
    return Layering(lower).run(upper.root());
}

}  // namespace qcow
