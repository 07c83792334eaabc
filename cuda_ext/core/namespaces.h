// Interned names of prefix-cache namespaces, counted so that a name that nobody uses is forgotten.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace dendrite {

class Namespaces {
 public:
  // Returns the id of `name` (a new one for a new name) and takes one reference.
  int32_t hold(const std::string& name) {
    auto found = ids_.find(name);
    if (found != ids_.end()) {
      ++entries_[found->second].refs;
      return found->second;
    }
    int32_t id = static_cast<int32_t>(entries_.size());
    if (!free_.empty()) {
      id = free_.back();
      free_.pop_back();
    } else {
      entries_.emplace_back();
    }
    entries_[id] = {name, 1};
    ids_.emplace(name, id);
    return id;
  }

  void hold(int32_t id) { ++entries_[id].refs; }

  void drop(int32_t id) {
    if (--entries_[id].refs > 0) return;
    ids_.erase(entries_[id].name);
    free_.push_back(id);
  }

  // -1 for a name that is not in use.
  int32_t find(const std::string& name) const {
    auto found = ids_.find(name);
    return found == ids_.end() ? -1 : found->second;
  }

  const std::string& name(int32_t id) const { return entries_[id].name; }
  int32_t refs(int32_t id) const { return entries_[id].refs; }
  size_t size() const { return ids_.size(); }

 private:
  struct Entry {
    std::string name;
    int32_t refs = 0;
  };
  std::unordered_map<std::string, int32_t> ids_;
  std::vector<Entry> entries_;
  std::vector<int32_t> free_;
};

}  // namespace dendrite
